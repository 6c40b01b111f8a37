"""What runs beside a collective, of programs written by hand."""

from absl.testing import absltest, parameterized

from deepseek_jax.parallel import hlo, overlap
from deepseek_jax.training import ahead

_GEMM = (
  'custom_call_target="__cublas$lt$matmul", backend_config={{"dot_dimension_'
  'numbers":{{"lhs_contracting_dimensions":["{}"],"rhs_contracting_'
  'dimensions":["0"]}}}}'
)
_AT_MOST_ONCE = f'metadata={{op_name="jit(f)/{hlo.AT_MOST_ONCE}/while"}}'
_TEXT = f"""\
%once (t: (f32[4,8])) -> (f32[4,8]) {{
  %t = (f32[4,8]{{1,0}}) parameter(0)
  %u = f32[4,8]{{1,0}} get-tuple-element(%t), index=0
  %in_loop = f32[4,4]{{1,0}} dot(%u, %u), lhs_contracting_dims={{1}}
}}
%round (t: (f32[4,8])) -> (f32[4,8]) {{
  %t.1 = (f32[4,8]{{1,0}}) parameter(0)
  %v = f32[4,8]{{1,0}} get-tuple-element(%t.1), index=0
  %in_round = f32[4,4]{{1,0}} dot(%v, %v), lhs_contracting_dims={{1}}
  %further = f32[4,8]{{1,0}} all-to-all(%v), replica_groups={{{{0,1}}}}
}}
%maybe (t: (f32[4,8])) -> (f32[4,8]) {{
  %t.2 = (f32[4,8]{{1,0}}) parameter(0)
  %y = f32[4,8]{{1,0}} get-tuple-element(%t.2), index=0
  %in_maybe = f32[4,4]{{1,0}} dot(%y, %y), lhs_contracting_dims={{1}}
  %optional = f32[4,8]{{1,0}} all-to-all(%y), replica_groups={{{{0,1}}}}
  %within = (f32[4,8]{{1,0}}) while(%t.2), body=%round, \
metadata={{op_name="jit(f)/{hlo.AT_MOST_ONCE}/while/body/while"}}
}}
%small (p: f32[4,8]) -> f32[4,4] {{
  %a = f32[4,8]{{1,0}} parameter(0)
  %s = f32[4,4]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}
}}
%large (p: f32[4,8]) -> f32[8,8] {{
  %b = f32[4,8]{{1,0}} parameter(0)
  %l = f32[8,8]{{1,0}} dot(%b, %b), lhs_contracting_dims={{0}}
}}
ENTRY %main (x: f32[4,8], w: f32[8,2]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %w = f32[8,2]{{1,0}} parameter(1)
  %start = (f32[4,8]{{1,0}}, f32[4,8]{{1,0}}) all-to-all-start(%x), \
replica_groups={{{{0,1}}}}
  %gemm = (f32[4,2]{{1,0}}, s8[9]{{0}}) custom-call(%x, %w), {_GEMM.format(1)}
  %kernel = f32[4,8]{{1,0}} custom-call(%x), \
custom_call_target="mosaic_gpu_v2"
  %done = f32[4,8]{{1,0}} all-to-all-done(%start)
  %after = f32[4,2]{{1,0}} custom-call(%done, %w), {_GEMM.format(1)}
  %three = (f32[4,8]{{1,0}}) while(%x), body=%once, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %blocks = (f32[4,8]{{1,0}}) while(%x), body=%once
  %rounds = (f32[4,8]{{1,0}}) while(%x), body=%round
  %head = (f32[4,8]{{1,0}}) while(%x), body=%once, {_AT_MOST_ONCE}
  %mtp = (f32[4,8]{{1,0}}) while(%x), body=%maybe, {_AT_MOST_ONCE}
  %branch = f32[4]{{0}} conditional(%x), branch_computations={{%large, %small}}
}}
"""
_DOT = 2 * 4 * 4 * 8.0
_PRODUCT = 2 * 4 * 2 * 8.0


class OverlapTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.found = overlap.beside(hlo.parse(_TEXT))

  def test_between_start_and_done(self):
    self.assertEqual(self.found['start'].hidden, (_PRODUCT, 1))

  def test_independent_of_it(self):
    """Loops of 3 and of 1, the lesser branch; not `after`, nor what may not be.

    That is a further round, and loops in place of a conditional.
    """
    self.assertEqual(self.found['start'].free, (_PRODUCT + 5 * _DOT, 1))

  def test_the_whole_computation(self):
    self.assertEqual(self.found['start'].whole, (2 * _PRODUCT + 5 * _DOT, 1))
    self.assertEqual(self.found['start'].computation, 'main')

  def test_an_exchange_that_is_not_asynchronous_hides_nothing(self):
    around = self.found['further']
    self.assertEqual(around.free, (_DOT, 0))
    self.assertFalse(around.hidden)

  def test_what_each_part_sends(self):
    """A further round counts for nothing; a conditional's part as one."""
    found = hlo.collectives(hlo.parse(_TEXT), {'expert': 2})
    program = ahead.Program(_TEXT, 0, 0, found, 0.0, 0.0)
    *_, rule, inner, outer = ahead.describe_overlap(program).splitlines()
    self.assertStartsWith(rule, '|---')
    part, size = 'expert | all-to-all', '6.4e-05'  # Half of 128 bytes.
    self.assertEqual(inner, f'| maybe | {part} | {size} | {size} | 0 |')
    self.assertEqual(outer, f'| main | {part} | {size} | {size} | {size} |')


if __name__ == '__main__':
  absltest.main()
