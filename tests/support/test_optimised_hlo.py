"""Reading of optimised HLO, on lines as the compiler writes them."""

from tests.support.optimised_hlo import OptimisedHlo

TEXT = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (2, {}, may-alias), \
{1}: (7, {}, must-alias) }, entry_computation_layout={()->f32[4]{0}}

ENTRY %main (a: bf16[8,128]) -> (bf16[8,128], bf16[8,128]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %call = (f32[4]{0}, bf16[8,128]{1,0:T(8,128)(2,1)}) custom-call(%a), \
custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (0, {})}
  %element = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%call), index=1
  %copy = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%element)
  %other = bf16[8,1280]{1,0:T(8,128)(2,1)} negate(%b)
  ROOT %tuple = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) tuple(%element, %copy)
}
"""


def test_aliases():
    hlo = OptimisedHlo(TEXT)
    assert hlo.aliases == {0: 2, 1: 7}
    assert hlo.num_aliased_parameters == 2


def test_an_only_result_is_output_0():
    header = "HloModule m, input_output_alias={ {}: (1, {}, may-alias) }, entry_x\n"
    assert OptimisedHlo(header).aliases == {0: 1}


def test_a_program_without_aliases():
    assert OptimisedHlo("HloModule m, is_scheduled=true\n").aliases == {}


def test_copies():
    hlo = OptimisedHlo(TEXT)
    assert hlo.copies_of("bf16[8,128]") == ["copy"]
    assert hlo.copies_of("bf16[8,12]") == []


def test_operations():
    operations = list(OptimisedHlo(TEXT).operations())
    names = [operation.name for operation in operations]
    assert names == ["tpu_custom_call", "get-tuple-element", "copy", "negate", "tuple"]
    assert operations[2].result_type == "bf16[8,128]{1,0:T(8,128)(2,1)}"
    assert len(OptimisedHlo(TEXT).kernel_calls) == 1
