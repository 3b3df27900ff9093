"""A checkout and two workers for tests of the launch scripts, where `gcloud`, `ssh` and Slurm are recorders that act.

They evaluate what is sent to a worker in a home directory of its own, down to a `rcgrpo` that notes its arguments.
"""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SYSTEM = "/usr/bin:/bin"
DIRECTORY = 'rcgrpo/"$(hostname)"'
UNPACK = (
    f"mkdir -p {DIRECTORY}/code && cd {DIRECTORY} && flock --nonblock --conflict-exit-code 0 lock "
    "sh -c 'rm -rf code/rcgrpo_jax && tar -xz -C code' && "
)
WORKER = "bash code/launch/lib_worker.sh"
TRAIN = ["train", "--config", "configs/a.py:v5e_16", "--workdir", "gs://bucket/run"]
HARD = [
    "train", "--workdir=/data/a b", "it's", '"quoted"', "$HOME `id` $(id) \\", "", "two\nlines", "*", "~", "#", "&;|<>",
    "ü 彩虹", "--config.rewards=('a', 1)", "--", "-x", "!!",
]  # fmt: skip

RECORD = r"""#!/bin/bash
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >>"$SITE/calls"
"""
# What the stand-ins do besides: `states` holds what the API will say, `refused` a line for each request to create that
# fails, `lost` the numbers of the connections that do.
STAND_INS = {
    "gcloud": r"""
case "$4 $*" in
  describe*failedData*) echo "no quota for v5e" ;;
  describe*)
    state=$(head -n 1 "$SITE/states")
    sed -i 1d "$SITE/states"
    case $state in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: Resource 'rc' was not found" >&2; exit 1 ;;
      OFFLINE) echo "ERROR: (gcloud) cannot reach the network" >&2; exit 1 ;;
      *) echo "$state" ;;
    esac
    ;;
  create*) [ ! -s "$SITE/refused" ] || { sed -i 1d "$SITE/refused"; exit 1; } ;;
  delete*) rm -rf "$SITE"/home?/* ;;
  scp*) for home in "$SITE"/home?; do cp "$5" "$home/${6#*:}"; done ;;
  ssh*)
    echo >>"$SITE/connections"
    ! grep --quiet --line-regexp "$(wc -l <"$SITE/connections")" "$SITE/lost" || exit 255
    for word in "$@"; do case $word in --command=*) command=${word#*=} ;; esac; done
    for home in "$SITE"/home?; do (export HOME=$home; cd; exec bash -c "$command") || code=$?; done
    exit "${code:-0}"
    ;;
esac
""",
    "ssh": r"""
for word in "$@"; do case $word in *host?) home=$SITE/home${word: -1} ;; esac; done
export HOME=$home
cd && exec sh -c "${!#}"
""",
    "srun": r"""
while [[ $1 == --* ]]; do shift; done
export HOME=$SITE/home0 SLURM_PROCID=0 SLURM_GPUS_ON_NODE=2
exec "$@"
""",
    "sbatch": "", "scontrol": "", "sudo": "", "gcsfuse": "sleep 10 &",
    "curl": '[ -e "$SITE/healthy" ]',
    "mountpoint": "exit 1",
    "nvidia-smi": "",
    "python3": r"""
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
cp "$SITE"/bin/{pip,rcgrpo,python,vllm} "$3/bin"
""",
    "python": 'mkdir "${!#}"',  # merges
    "vllm": r"""
echo "GPU $CUDA_VISIBLE_DEVICES"
. "$SITE/behaviour"
""",
    "pip": "",
    "rcgrpo": r"""
printf '%s\0' "$@" >"$HOME/argv"
env >"$HOME/env"
trap 'echo saved; exit 143' TERM
echo "step 1"
. "$SITE/behaviour"
""",
}  # fmt: skip
WAIT = 'touch "$HOME/ready"; for i in {1..1500}; do sleep 0.02; done'


class Site:
    """A checkout, two workers and the stand-ins, in a directory."""

    def __init__(self, path: Path):
        self.path, self.checkout = path, path / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "configs").mkdir()
        (self.checkout / "configs" / "a.py").touch()
        (self.checkout / "new.txt").write_text("neither committed nor added")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)
        self.homes = [path / "home0", path / "home1"]
        for folder in (path / "bin", path / "tmp", *self.homes):
            folder.mkdir()
        for name, acts in STAND_INS.items():
            (path / "bin" / name).write_text(RECORD + acts)
            (path / "bin" / name).chmod(0o755)
        for name in ("states", "refused", "lost", "behaviour", "connections", "calls"):
            (path / name).touch()

    def run(self, script: str, *argv: str, states: str = "", lost: str = "", does: str = "", **environment: str):
        """Runs `launch/SCRIPT ARGV` where the API gives `states`, connections `lost` fail and rcgrpo `does` that."""
        for name, words in (("states", states), ("lost", lost)):
            (self.path / name).write_text("".join(f"{word}\n" for word in words.split()))
        (self.path / "behaviour").write_text(does)
        for name in ("calls", "connections"):
            (self.path / name).write_text("")
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / script), *argv],
            env=self.environment() | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.path}/bin:{SYSTEM}", "HOME": str(self.homes[0]), "TMPDIR": str(self.path / "tmp"),
            "LC_ALL": "C.UTF-8", "SITE": str(self.path), "RCGRPO_LAUNCH_POLL": "0",
        }  # fmt: skip

    def calls(self, *programs: str) -> list[list[str]]:
        """What was run, in order; of these programs only, if any are named."""
        calls = [call.split("\x1f")[:-1] for call in (self.path / "calls").read_text().split("\x1e")[:-1]]
        return [call for call in calls if not programs or call[0] in programs]

    def argv(self, worker: int) -> list[str]:
        """The arguments that rcgrpo got there."""
        return (self.homes[worker] / "argv").read_text().split("\0")[:-1]

    def environ(self, worker: int, name: str) -> str | None:
        """A variable that rcgrpo saw there."""
        lines = (self.homes[worker] / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get(name)


def far(verb: str) -> str:
    return f"cd {DIRECTORY} && {WORKER} {verb}"
