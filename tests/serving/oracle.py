"""What a request alone would generate, from one forward pass with eager attention."""

import torch

from torch_rpa.serving import GenerationOutput, SamplingParams, sampling


@torch.no_grad()
def expected_tokens(
    eager, output: GenerationOutput, params: SamplingParams
) -> list[int]:
    """Returns the tokens that the model chooses after each prefix of the result.

    If they are the generated ones, then so is the text of a loop that computes one
    token at a time: each token follows from those before it.
    """
    tokens = output.prompt_ids + output.generated_tokens
    logits = eager(torch.tensor([tokens])).logits[0, len(output.prompt_ids) - 1 : -1]
    if params.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    assert params.seed is not None, "another seed would be drawn in each run"
    positions = range(len(output.prompt_ids), len(tokens))
    return [
        int(
            sampling.sample(
                row[None],
                sampling.build_sampling_inputs(
                    [(params, params.seed, position)], 1, len(row)
                ),
            )
        )
        for position, row in zip(positions, logits, strict=True)
    ]
