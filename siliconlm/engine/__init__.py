"""One function a command. Parts are put together here and nowhere else: settings go in, events come out.

Only `silicon doctor` stands elsewhere (`hardware.diagnosis.diagnose`): it must answer where torch cannot be imported.
"""

from siliconlm import config as configs
from siliconlm.data.prepare import prepare
from siliconlm.data.sources import BUILTIN
from siliconlm.engine.datasets import Preparation, prepare_sources
from siliconlm.engine.finetuning import finetune
from siliconlm.engine.measuring import export_profile, list_profiles, plan, probe_batch, profile, self_test
from siliconlm.engine.models import Opened, export_folder, measure_tasks, open_batch, open_model, sample, talk, validate
from siliconlm.engine.setup import Request, dataset_name, default_data, device_choices
from siliconlm.engine.training import forecast, resume, runs, train

__all__ = [
    "BUILTIN",
    "Opened",
    "Preparation",
    "Request",
    "configs",
    "dataset_name",
    "default_data",
    "device_choices",
    "export_folder",
    "export_profile",
    "finetune",
    "forecast",
    "list_profiles",
    "measure_tasks",
    "open_batch",
    "open_model",
    "plan",
    "prepare",
    "prepare_sources",
    "probe_batch",
    "profile",
    "resume",
    "runs",
    "sample",
    "self_test",
    "talk",
    "train",
    "validate",
]
