"""Compile-only devices: their number, their errors, and what they compile."""

import json
from unittest import mock

from absl.testing import parameterized
from jax.experimental import topologies

from deepseek_jax.parallel import topology
from tests import deviceless

_PROGRAM = """
import json
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from deepseek_jax.parallel import topology
devices = topology.topology('h100', 2048)
mesh = Mesh(np.reshape(devices, (256, 8)), ('node', 'expert'))
x = jax.ShapeDtypeStruct(
  (4096, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P('expert'))
)
step = jax.jit(lambda x: jnp.sum(x @ x.T, dtype=jnp.float32)).lower(x).compile()
print(json.dumps({
  'kind': topology.topology('h200', 1)[0].device_kind,
  'nodes': len({d.process_index for d in devices}),
  'hlo': step.as_text(),
  'arguments': step.memory_analysis().argument_size_in_bytes,
  'default': jax.devices()[0].platform,
}))
"""


class TopologyTest(parameterized.TestCase):
  @parameterized.parameters(('a100', 1), ('h100', 0), ('h100', 9), ('h200', 12))
  def test_refuses(self, name, n):
    with self.assertRaisesRegex(ValueError, 'use '):
      topology.topology(name, n)

  def test_says_what_to_install(self):
    missing = NotImplementedError('topology not implemented for cuda')
    with (
      mock.patch.object(topologies, 'get_topology_desc', side_effect=missing),
      self.assertRaisesRegex(RuntimeError, 'jax-cuda13-plugin'),
    ):
      topology.topology('h100', 1)

  def test_compiles_for_2048_devices(self):
    done = json.loads(deviceless.run('-c', _PROGRAM))
    self.assertEqual(done['kind'], 'NVIDIA H200')
    self.assertEqual(done['nodes'], 256)
    self.assertEqual(done['default'], 'cpu')
    self.assertEqual(done['arguments'], 4096 // 8 * 256 * 2)
    self.assertRegex(done['hlo'], 'all-(gather|reduce)')
