"""The order of the notebooks under one profile: `snakemake --cores all --config profile=emoji` (`make reproduce`).

`codalib run --executor slurm` adds `cluster=true`: then each stage is a job of what its profile's `resources` say.

A stage runs again when its notebook, the profile's values for it, a module that shapes its numbers, its data or a stage
before it has changed. Its checkpoints are nobody's output, so that an interrupted stage finds them and goes on.
"""

import os
import sys

from codalib.base.hardware import stages_side_by_side
from codalib.base.paths import MANIFEST, reports_folder, runs_folder
from codalib.workflow.dependencies import library_files, outside
from codalib.workflow.profiles import profile_resources, profile_section, profile_stages

PROFILE = config.get("profile", "emoji")
RUNS = os.path.relpath(runs_folder(PROFILE))
REPORTS = os.path.relpath(reports_folder(PROFILE))
PYTHON = sys.executable
CLUSTER = config.get("cluster", False)
SHARE = None if CLUSTER else max(1, workflow.cores // stages_side_by_side())  # cores of a stage

ORDER = [
    "start_here",
    "explore",
    "bring_your_own",
    "00_pretrain_vae",
    "01_quantizer_factorial",
    "01_adapted_factorial",
    "01_training_budget",
    "01_train_tokenizer",
    "01_train_baselines",
    "01_train_variants",
    "02_train_maskgit",
    "02_compare_tokenizers",
    "03_text_to_image",
    "fig1_comparison",
    "fig3_latent_space",
    "fig4_levels",
    "fig5_confidence",
    "fig6_dynamics",
    "table1_ablation",
    "table2_reconstruction",
    "fig7_reconstructions",
    "table3_generation",
    "table4_ablations",
    "table5_text_to_image",
    "fig7_samples",
    "fig8_codebook",
]
# Stage -> the stages whose folders its values name. An unknown profile stops here, with the known ones named.
STAGES = profile_stages(PROFILE, ORDER)


def finished(stages):
    return [f"{RUNS}/{stage}/{MANIFEST}" for stage in stages]


def files(folder, *endings):
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.endswith(endings))


def resources(stage):
    return profile_resources(PROFILE, stage).for_snakemake() if CLUSTER else {}


def watched(stage):
    values = profile_section(PROFILE, stage)
    return values | outside(values)


def of_stage(name):
    return lambda wildcards: resources(wildcards.stage).get(name)


ASKED = ("gpu", "mem_mb", "runtime", "slurm_partition", "slurm_account", "nodes") if CLUSTER else ()


wildcard_constraints:
    stage="|".join(STAGES),


rule all:  # names every result, so that one that an interrupted run took away is made again
    input:
        finished(STAGES),
        expand(REPORTS + "/{stage}.html", stage=STAGES),
        f"{REPORTS}/index.html",


rule stage:
    input:
        needs=lambda wildcards: finished(STAGES[wildcards.stage]),
        library=lambda wildcards: library_files(f"notebooks/{wildcards.stage}.ipynb"),
        data=files("data", ".parquet", ".safetensors"),
        notebook="notebooks/{stage}.ipynb",
    output:
        manifest=RUNS + "/{stage}/" + MANIFEST,
        page=REPORTS + "/{stage}.html",
    params:
        values=lambda wildcards: watched(wildcards.stage),
    # On one machine a stage's share of it; without `codalib run --exclusive` one stage at a time, with all of it.
    threads: lambda wildcards: profile_resources(PROFILE, wildcards.stage).cores if CLUSTER else SHARE
    resources:
        **{name: of_stage(name) for name in ASKED},
    shell:
        "{PYTHON:q} -m codalib run {input.notebook:q} --profile {PROFILE:q}"


rule report:
    input:
        finished(STAGES),
        pages=expand(REPORTS + "/{stage}.html", stage=STAGES),
        library=library_files("notebooks/report.ipynb"),
        templates=files("codalib/reporting/templates", ""),
        notebook="notebooks/report.ipynb",
    output:
        index=f"{REPORTS}/index.html",
        page=f"{REPORTS}/report.html",
    params:
        values=profile_section(PROFILE, "report"),
    threads: profile_resources(PROFILE, "report").cores if CLUSTER else 1
    resources:
        **{name: value for name, value in resources("report").items() if value is not None},
    shell:
        "{PYTHON:q} -m codalib run {input.notebook:q} --profile {PROFILE:q}"
