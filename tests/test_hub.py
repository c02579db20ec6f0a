"""Hub ids and revisions, with the hub's own client in a process of its own, against a stand-in on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub import hub

# What a user does with the hub; every line of output is a check that held.
CLIENT = """
import sys
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
import ropepatch
from ropepatch.errors import ModelLoadError
from ropepatch.testing.tiny import tiny_model

IDS = torch.arange(150).mul(7).remainder(128)[None]
folder = sys.argv[1]

def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits

def check(name, found, wanted, record):
    assert torch.equal(logits(found), wanted), name
    assert (ropepatch.record_of(found) or {}).get("method") == record, name
    print("held:", name)

def refused(name, **given):
    try:
        ropepatch.from_pretrained(name, **given)
    except ModelLoadError as error:
        assert name in str(error), error
        print("held: refused", name, *given.values())

model = tiny_model("llama").eval()
plain = logits(model)
ropepatch.save_pretrained(model, folder + "/base", push_to_hub="me/base")
check("unpatched", ropepatch.from_pretrained("me/base"), plain, None)

ropepatch.patch(model, "yarn", factor=4)
yarn = logits(model)
ropepatch.save_pretrained(model, folder + "/model", push_to_hub="me/model")
first = ropepatch.from_pretrained("me/model")
check("pushed by ours", first, yarn, "yarn")
commit = HfApi().model_info("me/model").sha
ropepatch.unpatch(model)
ropepatch.patch(model, "self_extend", factor=4)
extended = logits(model)
ropepatch.save_pretrained(model, folder + "/model", push_to_hub="me/model")
check("the newest", ropepatch.from_pretrained("me/model"), extended, "self_extend")
check("a revision", ropepatch.from_pretrained("me/model", revision=commit), yarn, "yarn")

model.push_to_hub("me/theirs")
check("pushed by transformers", ropepatch.from_pretrained("me/theirs"), extended, "self_extend")
ropepatch.unpatch(model)
ropepatch.patch(model, "kerple")
for parameter in (p for n, p in model.named_parameters() if "ropepatch_bias" in n):
    parameter.data.add_(torch.rand_like(parameter))
learned = logits(model)
ropepatch.save_pretrained(model, folder + "/learned", push_to_hub="me/learned")
check("learned parameters", ropepatch.from_pretrained("me/learned"), learned, "kerple")

base = ropepatch.patch(ropepatch.from_pretrained("me/base"), "yarn", factor=4)
adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
tuned = logits(adapted)
ropepatch.save_pretrained(adapted, folder + "/adapter", push_to_hub="me/adapter")
check("an adapter pushed by ours", ropepatch.from_pretrained("me/adapter"), tuned, "yarn")
adapted.push_to_hub("me/peft")
check("an adapter pushed by peft", ropepatch.from_pretrained("me/peft"), tuned, "yarn")

refused("me/nothing")
refused("me/model", revision="nowhere")
"""
HELD = [
    "unpatched",
    "pushed by ours",
    "the newest",
    "a revision",
    "pushed by transformers",
    "learned parameters",
    "an adapter pushed by ours",
    "an adapter pushed by peft",
    "refused me/nothing",
    "refused me/model nowhere",
]


def test_models_and_adapters_travel_through_the_hub(tmp_path: Path) -> None:
    with hub() as served:
        environment = {
            **os.environ,
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_for_this_test_only",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "no_proxy": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert [line.removeprefix("held: ") for line in done.stdout.splitlines() if line.startswith("held: ")] == HELD
    assert served.unknown == []
    assert "ropepatch.json" in served.commits["me/model"][-1][1]
    # The card of the newest speaks of the newest patch.
    assert b"self_extend" in served.commits["me/model"][-1][1]["README.md"]
    assert b"yarn" in served.commits["me/model"][1][1]["README.md"]
