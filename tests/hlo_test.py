"""The HLO reader against programs whose communication is known."""

import functools

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ParallelConfig
from deepseek_jax.parallel import hlo, mesh, pipeline

_SIZES = ParallelConfig(data=2, node=2, expert=2)


@functools.cache
def _program():
  """A gather, a loop of three sums, an exchange and a ring, and a product."""

  def run(x, w):
    whole = lax.all_gather(x, 'expert', tiled=True)  # [8, 4]

    def body(_, y):
      return lax.psum(y, ('data', 'node')) * 0.5

    summed = lax.fori_loop(0, 3, body, x)
    swapped = lax.all_to_all(x, 'data', 0, 0, tiled=True)
    ring = lax.ppermute(x, 'node', [(0, 1), (1, 0)])
    return whole.sum() + summed + swapped + ring, w @ w

  with jax.set_mesh(mesh.build(_SIZES, jax.devices()[:8])):
    batch = P(('data', 'node', 'expert'))
    mapped = jax.shard_map(
      run, in_specs=(batch, P()), out_specs=(batch, P()), check_vma=False
    )
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 4), (8, 8))]
    return hlo.parse(jax.jit(mapped).lower(*shapes).compile().as_text())


def _mesh_shape():
  return {axis: getattr(_SIZES, axis) for axis in mesh.AXES}


class HloTest(parameterized.TestCase):
  def test_collectives_of_a_program(self):
    found = hlo.collectives(_program(), _mesh_shape())
    facts = {
      c.kind: (c.axes, c.group, c.payload, c.times, c.sent) for c in found
    }
    self.assertEqual(
      facts,
      {
        'all-gather': (('expert',), 2, 128, 1, 64),
        'all-reduce': (('data', 'node'), 4, 64, 3, 288),
        'all-to-all': (('data',), 2, 64, 1, 32),
        'collective-permute': (('node',), 2, 64, 1, 64),
      },
    )
    self.assertTrue(all(c.is_counted for c in found))
    self.assertEqual(
      hlo.sent_by_axis(found),
      {('expert',): 64, ('data', 'node'): 288, ('data',): 32, ('node',): 64},
    )

  def test_what_may_run_beside_a_collective(self):
    """The product depends on nothing that is exchanged; the sum does."""
    program = _program()
    entry = program.computations[program.entry]
    gather = next(
      i.name for i in entry.values() if i.opcode.startswith('all-gather')
    )
    free = hlo.beside(entry, gather)
    dots = ('dot', '__onednn$matmul')
    self.assertTrue(any(program.has(i, dots) for i in free))
    root = list(entry.values())[-1]
    self.assertEqual(root.opcode, 'tuple')
    self.assertNotIn(root, free)

  @parameterized.parameters(
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', ('node', 'expert')),
    ('replica_groups=[4,2]<=[8]', ('expert',)),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', ('data', 'node')),
    ('replica_groups=[1,8]<=[8]', ('data', 'node', 'expert')),
    ('replica_groups={}', ('data', 'node', 'expert')),
    ('replica_groups=[8,1]<=[8]', None),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c'}", ('expert',)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ('data', 'node')),
    (
      "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}",
      ('node', 'expert'),
    ),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ('node',)),
    ("replica_groups=mesh['a'=8] {'a':(1)4}", ('data', 'node')),
  )
  def test_groups(self, groups, axes):
    text = (
      'ENTRY %main (p: f32[4]) -> f32[4] {\n'
      '  %p = f32[4]{0} parameter(0)\n'
      f'  ROOT %r = f32[4]{{0}} all-reduce(%p), {groups}, to_apply=%add\n'
      '}\n'
    )
    found = hlo.collectives(hlo.parse(text), _mesh_shape())
    self.assertEqual([c.axes for c in found], [] if axes is None else [axes])

  def test_groups_in_an_unknown_form(self):
    text = '  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=new(3)\n}\n'
    text = 'ENTRY %main (p: f32[4]) -> f32[4] {\n' + text
    with self.assertRaisesRegex(ValueError, r'not known: .*new\(3\)'):
      hlo.collectives(hlo.parse(text), _mesh_shape())

  def test_an_asynchronous_exchange_and_an_open_loop(self):
    text = """\
%body (t: (u8[6,4])) -> (u8[6,4]) {
  %t = (u8[6,4]{1,0}) parameter(0)
  %x = u8[6,4]{1,0} get-tuple-element(%t), index=0
  %o = u8[9,4]{1,0} broadcast(%c), dimensions={}
  %s = ((u8[6,4]{1,0}, u8[9,4]{1,0}, /*index=2*/s64[2]{0}), u8[9,4]{1,0}) \
ragged-all-to-all-start(%x, %o, %n), replica_groups=[4,2]<=[8]
  %d = u8[9,4]{1,0} ragged-all-to-all-done(%s)
}
ENTRY %main (p: (u8[6,4])) -> (u8[6,4]) {
  %p = (u8[6,4]{1,0}) parameter(0)
  ROOT %w = (u8[6,4]{1,0}) while(%p), condition=%cond, body=%body
}
"""
    (found,) = hlo.collectives(hlo.parse(text), _mesh_shape())
    self.assertEqual(found.kind, 'ragged-all-to-all')
    self.assertEqual((found.payload, found.dtypes), (24, ('u8',)))
    self.assertFalse(found.is_counted)
    self.assertEmpty(hlo.sent_by_axis([found]))

  def test_a_conditional_in_place_counts_once(self):
    """By its name, which XLA keeps; not so a loop of unknown length within."""

    def run(flag, n, x):
      def update(x):
        return lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x * 2)

      return pipeline._if(flag, update, x)

    compiled = jax.jit(run).lower(1, 3, jnp.ones(8)).compile()
    program = hlo.parse(compiled.as_text())
    loops = [
      i
      for computation in program.computations.values()
      for i in computation.values()
      if i.opcode == 'while'
    ]
    self.assertEqual([hlo.known_trips(loop) for loop in loops], [None, None])
    found = [hlo.is_at_most_once(loop) for loop in loops]
    self.assertEqual(found, [False, True])  # What is called comes first.
