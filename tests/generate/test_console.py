"""Several texts grow at once, and each line is whole."""

import io

from torch_rpa.generate.console import StreamPrinter, printable
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import GenerationOutput, RequestUpdate


def printed(texts):
    """Prints texts of (prompt, rest), a token of each in turn."""
    out = io.StringIO()
    printer = StreamPrinter(ByteTokenizer(), out, num_texts=len(texts))
    waiting = {}
    for prompt, rest in texts:
        printer.add(prompt, prompt)
        waiting[prompt] = list(rest.encode())
    seen = []
    while waiting:
        for name, tokens in list(waiting.items()):
            token, is_last = tokens.pop(0), not tokens
            printer.update(RequestUpdate(GenerationOutput(name, []), [token], is_last))
            seen.append(out.getvalue())
            if is_last:
                del waiting[name]
    return out.getvalue(), seen


def test_one_text_is_printed_as_it_comes():
    text, seen = printed([("a b", "c\nd\u00e9")])
    assert text == "a bc\nd\u00e9\n"
    assert seen == ["a bc", "a bc\n", "a bc\nd", "a bc\nd", "a bc\nd\u00e9\n"]


def test_several_texts_are_printed_line_by_line():
    text, _ = printed([("one", "1\n2"), ("two", "\n\n33"), ("three", "3")])
    lines = ["[1] two", "[2] three3", "[0] one1", "[1] ", "[0] 2", "[1] 33"]
    assert sorted(text.splitlines()) == sorted(lines)
    assert text.endswith("[1] 33\n")


def test_terminals_see_no_control_characters():
    assert printable("a\x1b[1m\n\u00e9\x00") == "a\\x1b[1m\n\u00e9\\x00"
