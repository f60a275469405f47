"""Stage `register`: an evaluated model becomes a version in the MLflow registry, with its lineage."""

import json
from importlib import import_module

from katcore.pipeline.plan import UNIFIED
from katcore.pipeline.stage import Job
from katcore.schema.event import ModelRegistered

ALIAS = "candidate"


def run(job: Job) -> dict[str, float]:
    """Register `kat-<expert>` or `kat-unified`; `@candidate` moves there unless the gate refused it."""
    name = job.spec.expert or UNIFIED
    made_by = f"{name}.rl" if job.spec.expert else f"{UNIFIED}.distill"
    judged_by = f"{name}.evaluate" if job.spec.expert else f"{UNIFIED}.gate"
    manifest = json.loads((job.input(judged_by) / "manifest.json").read_bytes())
    is_held = bool(manifest["metrics"].get("held", 1.0))
    aliases = (ALIAS,) if is_held else ()
    tags = {
        "katcore.stage": made_by,
        "katcore.key": job.input(made_by).name,
        "katcore.preset": job.preset.name,
        "katcore.seed": str(job.seed),
        "katcore.gate": "held" if is_held else "not held",
    }
    folder = job.input(made_by) / "model"
    models = import_module("katcore.registry.models")
    version = models.register(f"kat-{name}", folder, tags, aliases)
    (job.out / "version.json").write_text(json.dumps({"name": f"kat-{name}", "version": version}))
    event = ModelRegistered(f"kat-{name}", version, str(folder), aliases)
    job.plugins.notify("katcore_model_registered", event)
    return {"version": float(version)}
