#!/usr/bin/env bash
# timm 1.0.31: `legacy_seresnext50_32x4d` trains with dropout of .2 before its classifier, `seresnext50_32x4d` with none.
#
# Both are the SE-ResNeXt-50 that papers name, and neither call sets a rate. The docstring of the legacy class says that
# SE-ResNeXt has no dropout, as the code had that it was taken from (Cadene, pretrainedmodels: `dropout_p=None`).
# It is a function and no layer, so neither print(net) nor a search for nn.Dropout shows it, and the features
# (`pre_logits=True`) are dropped as well. So fine-tuning the two differs in more than the weights one starts from.
# timm.create_model(name, drop_rate=0.0) makes them alike.
#
# Needs Python 3.10 or later and the network; weights are random. On Linux torch comes with CUDA, some gigabytes, unless
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set. Fails if the output changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet timm==1.0.31 torch==2.15.0 torchvision==0.29.2

cat >"$work/expected" <<'END'
legacy_seresnext50_32x4d: drop_rate 0.2, Dropout layers 0, features set to zero in training 20 %
seresnext50_32x4d: drop_rate 0.0, Dropout layers 0, features set to zero in training 0 %
legacy_seresnext50_32x4d, drop_rate=0.0: features set to zero in training 0 %
docstring of the legacy class: - For SE-ResNeXt models: None
END

"$work/venv/bin/python" - >"$work/seen" <<'END'
import timm
import torch


def zeros(net):
    """Share of a constant feature map that the head sets to zero in training mode."""
    torch.manual_seed(0)
    pooled = net.train().forward_head(torch.ones(100, 2048, 1, 1), pre_logits=True)
    return f"features set to zero in training {100 * (pooled == 0).float().mean():.0f} %"


legacy = "legacy_seresnext50_32x4d"
for name in (legacy, "seresnext50_32x4d"):
    net = timm.create_model(name)
    layers = sum(isinstance(module, torch.nn.Dropout) for module in net.modules())
    print(f"{name}: drop_rate {net.drop_rate}, Dropout layers {layers}, {zeros(net)}")
print(f"{legacy}, drop_rate=0.0: {zeros(timm.create_model(legacy, drop_rate=0.0))}")
text = timm.models.senet.SENet.__init__.__doc__.split("dropout_p")[1]
print("docstring of the legacy class:", next(line.strip() for line in text.splitlines() if "SE-ResNeXt" in line))
END

diff "$work/expected" "$work/seen" && cat "$work/seen"
