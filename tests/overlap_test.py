"""What runs beside a collective, of programs written by hand."""

from absl.testing import absltest, parameterized

from deepseek_jax.parallel import hlo, overlap
from deepseek_jax.training import ahead

_GEMM = (
  'custom_call_target="__cublas$lt$matmul", backend_config={{"dot_dimension_'
  'numbers":{{"lhs_contracting_dimensions":["{}"],"rhs_contracting_'
  'dimensions":["0"]}}}}'
)
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
    """Loops of 3 and of 1, no further round, the lesser branch; not `after`."""
    self.assertEqual(self.found['start'].free, (_PRODUCT + 5 * _DOT, 1))

  def test_the_whole_computation(self):
    self.assertEqual(self.found['start'].whole, (2 * _PRODUCT + 5 * _DOT, 1))
    self.assertEqual(self.found['start'].computation, 'main')

  def test_an_exchange_that_is_not_asynchronous_hides_nothing(self):
    around = self.found['further']
    self.assertEqual(around.free, (_DOT, 0))
    self.assertFalse(around.hidden)

  def test_what_each_part_sends(self):
    """A further round, which may not be, counts for nothing."""
    found = hlo.collectives(hlo.parse(_TEXT), {'expert': 2})
    program = ahead.Program(_TEXT, 0, 0, found, 0.0, 0.0)
    *_, rule, row = ahead.describe_overlap(program).splitlines()
    self.assertStartsWith(rule, '|---')
    megabytes = ' | '.join(['6.4e-05'] * 3)  # Half of 128 bytes.
    self.assertEqual(row, f'| main | expert | all-to-all | {megabytes} |')


if __name__ == '__main__':
  absltest.main()
