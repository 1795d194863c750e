"""Which stages a process exports."""

from sora_jax.export.job import groups, parameter_bytes
from sora_jax.export.stages import list_stages
from tests.support.exports import SIZE
from tests.support.tiny_model import CONFIG


def test_a_process_gets_stages_until_its_bytes_are_used():
    stages = list_stages(CONFIG, [SIZE])
    names = [stage.name for stage in stages]
    assert groups(stages, 0) == [[name] for name in names]
    assert groups(stages, 10**9) == [names]
    made = groups(stages, parameter_bytes(stages[0]))
    assert [name for group in made for name in group] == names
