"""Shares of a run: which clips each makes, whatever exists already; nothing is computed."""

from pathlib import Path

import pytest

from sora_jax.commands import main
from sora_jax.commands.jobs import Job, Naming, batches, plan_jobs
from sora_jax.devices.shares import ALL, Share

PROMPTS = [(f"a circle, {i}", "", "") for i in range(64)]


def planned(folder: Path, share: Share = ALL, *, group: int = 1, prompts: list[tuple[str, str, str]] = PROMPTS) -> list[Job]:
    naming = Naming(save_dir=folder, prompt_as_path=True)
    return plan_jobs(naming, prompts, num_samples=1, first=0, image=True, overwrite=False, share=share, group=group)


@pytest.mark.parametrize("group", [1, 5])
def test_four_shares_of_64_captions_joined_are_the_single_run(tmp_path: Path, group: int) -> None:
    shares = [planned(tmp_path, Share(i, 4), group=group) for i in range(4)]
    assert sorted((job for jobs in shares for job in jobs), key=lambda job: job.number) == planned(tmp_path)
    whole = [[job.number for job in batch] for batch in batches(planned(tmp_path), group)]
    dealt = [[job.number for job in batch] for jobs in shares for batch in batches(jobs, group)]
    assert sorted(dealt) == whole  # the same batches, so the same bits


def test_a_run_that_ended_early_goes_on_in_another_split(tmp_path: Path) -> None:
    done = planned(tmp_path, Share(1, 4))[:7]
    for job in done:
        job.path.write_text("made")
    rest = [job for i in range(3) for job in planned(tmp_path, Share(i, 3))]
    assert sorted(job.number for job in [*done, *rest]) == list(range(64))


def test_a_prompt_asked_for_twice_is_made_by_one_share(tmp_path: Path) -> None:
    jobs = [job for i in range(2) for job in planned(tmp_path, Share(i, 2), prompts=[*PROMPTS[:3], PROMPTS[0]])]
    assert sorted(job.number for job in jobs) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "model=2"), "names the axis 'model'; expected data, guidance, sequence"),
        (("--mesh", "sequence=2", "--memory-budget", "3GB"), "it does not go with --mesh: leave one of them out"),
        (("--mesh", "guidance=2", "--guidance", "1"), "with guidance 1 there is one row; leave guidance=2 out"),
        (("--mesh", "data=2", "--batch-size", "3"), "a batch of 3 cannot be divided over data=2"),
        (("--weights", "spread"), "weights=spread has no effect on one device"),
        (("--share", "4/4"), "share '4/4' is none; expected I/N with 0 <= I < N"),
        (("--mesh", "sequence=3"), "mesh 'sequence=3' has 3 devices, but there are 1 (cpu)"),
    ],
)
def test_what_no_machine_can_do_is_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "clip.mp4"
    assert main.main(["generate", "a red circle", "--model", str(tiny_model), "-o", str(out), *arguments]) == main.BAD_INPUT
    shown = capsys.readouterr()
    assert message in shown.err.splitlines()[-1]
    assert not out.exists()
