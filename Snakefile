"""Run chapters on one machine or many, rank a store in shards, and build the book (README, "On many machines").

snakemake --cores 2                                       # every chapter and seed, then the book
snakemake --cores 2 chapters --config profile=tiny chapters=02,03 seeds=0,1,2
snakemake --cores 2 result --config store=store/ shards=4

All jobs fill the one store of records, MMLIB_CACHE, which has to lie where every machine sees it.  The settings stand at
the top of the file; a relative path starts from here, wherever the command is given.
"""

from hashlib import sha256
from pathlib import Path

ROOT = Path(workflow.basedir)
KNOWN = "bin out profile device data store shards predict chapters seeds threads gpu".split()
if unknown := [name for name in config if name not in KNOWN]:
    raise WorkflowError(f"--config {unknown[0]}: no such setting; there are {', '.join(KNOWN)}")
COMMANDS = ROOT / str(config.get("bin", ".venv/bin"))  # where mmlib and jupyter-book are
OUT = ROOT / str(config.get("out", "_build/sweep"))
PROFILE, DEVICE = config.get("profile", "quick"), config.get("device", "auto")
DATA = config.get("data", "simulated")  # of the chapters: simulated, or a clip store
DATA = DATA if DATA == "simulated" else ROOT / str(DATA)  # a folder named by digits is a number there
STORE = ROOT / str(config["store"]) if "store" in config else None  # to rank, if any
PREDICT = str(config.get("predict", ""))  # further options of mmlib predict, such as "--members 4 --epochs 2"
EVERY = sorted(path.stem for path in (ROOT / "book" / "chapters").glob("*.ipynb"))
ON_DATA = [name for name in EVERY if DATA == "simulated" or name != "12_real_faces"]  # which reads tables instead


def listed(name, default):
    """Read a list from the command line, where 0,1 is text, 0 a number and [0,1] a list."""
    value = config.get(name, default)
    parts = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    return list(dict.fromkeys(part for part in (str(part).strip(" '\"") for part in parts) if part))


def number(name, text, least=0):
    """Read a whole number, as a chapter does: 010 is ten."""
    if not str(text).isdecimal() or int(text) < least:
        raise WorkflowError(f"{name}={text}: not a whole number >= {least}")
    return int(text)


def place(of, *asked):
    """Name a folder after a store and all that was asked of it: another one's results are not taken for its own."""
    return f"{of.name}-{sha256(repr([str(of), *asked]).encode()).hexdigest()[:8]}"


def find(asked):
    """Return the chapter that `asked` names, by its whole name or its number."""
    found = [name for name in EVERY if name == asked or name.split("_")[0] == asked.zfill(2)]
    if len(found) != 1:
        raise WorkflowError(f"chapters={asked}: no such chapter; there are {', '.join(EVERY)}")
    return found[0]


CHAPTERS = [find(name) for name in listed("chapters", ",".join(ON_DATA))]
SEEDS = list(dict.fromkeys(number("seeds", seed) for seed in listed("seeds", "0,1")))
RUNS = OUT / (DATA if DATA == "simulated" else place(DATA)) / str(PROFILE)
NOTEBOOKS = [RUNS / f"{chapter}-seed{seed}.ipynb" for chapter in CHAPTERS for seed in SEEDS]
RESULT = OUT / "predict" / (place(STORE, PREDICT) if STORE else "none") / "result.txt"
SHARDS = number("shards", config.get("shards", 4), least=1)
# What each job asks a cluster for: --config threads=8 gpu=1.
THREADS = number("threads", config.get("threads", 1), least=1)
GPU = {"gpu": number("gpu", config["gpu"])} if "gpu" in config else {}


workdir: OUT  # snakemake's own files too


localrules: all, chapters, result


rule all:
    input:
        OUT / "book.done",
        RESULT if STORE else [],


rule chapters:
    input:
        NOTEBOOKS,


rule result:
    input:
        RESULT,


rule chapter:
    """One chapter with one seed; the notebook of a run that failed or was killed is kept as NAME.failed.ipynb."""
    input:
        [] if DATA == "simulated" else DATA / "store.json",  # a store that is made anew is read anew
    output:
        RUNS / "{chapter}-seed{seed}.ipynb",
    log:
        RUNS / "{chapter}-seed{seed}.log",
    params:
        partial=str(RUNS / ".{chapter}-seed{seed}.partial-"),
        failed=str(RUNS / "{chapter}-seed{seed}.failed.ipynb"),
    threads: THREADS
    resources:
        **GPU,
    shell:
        "for left in {params.partial:q}*.ipynb; do if [ -e \"$left\" ]; then mv \"$left\" {params.failed:q}; fi; done; "
        "{COMMANDS:q}/mmlib rerun {wildcards.chapter} --out {output:q} -p seeds=[{wildcards.seed}] -p profile={PROFILE} "
        "-p data={DATA:q} -p device={DEVICE} > {log:q} 2>&1"


rule book:
    """The report, from the records that are there."""
    input:
        NOTEBOOKS,
    output:
        touch(OUT / "book.done"),
    log:
        OUT / "book.log",
    threads: THREADS
    resources:
        **GPU,
    shell:
        "cd {ROOT:q} && {COMMANDS:q}/jupyter-book build book/ > {log:q} 2>&1"


rule shard:
    """One part of the clips; shards that run at the same time train the members together."""
    input:
        STORE / "store.json" if STORE else [],
    output:
        temp(touch(RESULT.with_name("shard-{shard}.done"))),
    log:
        RESULT.with_name("shard-{shard}.log"),
    threads: THREADS
    resources:
        **GPU,
    shell:
        "{COMMANDS:q}/mmlib predict {STORE:q} --out {RESULT:q} --shard {wildcards.shard}/{SHARDS} --device {DEVICE} "
        "{PREDICT} > {log:q} 2>&1"


rule merge:
    input:
        STORE / "store.json" if STORE else [],
        expand(RESULT.with_name("shard-{shard}.done"), shard=range(1, SHARDS + 1)),
    output:
        RESULT,
    log:
        RESULT.with_name("merge.log"),
    shell:
        "{COMMANDS:q}/mmlib predict {STORE:q} --out {output:q} --merge {SHARDS} --device {DEVICE} {PREDICT} "
        "> {log:q} 2>&1"
