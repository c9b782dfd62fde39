#!/usr/bin/env bash
# Makes a Determined container ready. Determined *sources* this under `set -ex`, in every container and at each
# restart: nothing here may exit, and what is there already must cost no time.
#
# Torch stays the image's. Its version may be one that pip takes for older than any requirement (2.3.0a0+…), so
# what depends on torch is installed without its dependencies, and theirs are named here.

efficientdet_missing="$(python3 - <<'EOF'
import importlib.util as util

def have(module):
    return util.find_spec(module) is not None

on_torch = {"effdet": "effdet==0.4.1", "timm": "timm==1.0.31"}
plain = {
    "hotcoco": "hotcoco>=1.3", "huggingface_hub": "huggingface_hub", "matplotlib": "matplotlib",
    "msgspec": "msgspec", "numpy": "numpy", "omegaconf": "omegaconf", "PIL": "pillow",
    "pycocotools": "pycocotools", "safetensors": "safetensors", "tabulate": "tabulate",
    "tensorboard": "tensorboard", "tqdm": "tqdm", "yaml": "pyyaml",
}
torch_needs = [need for module, need in on_torch.items() if not have(module)]
if not have("torchvision"):
    # torch 2.N and torchvision 0.(N + 15) are one release
    from importlib.metadata import version

    torch_needs.append(f"torchvision==0.{int(version('torch').split('.')[1]) + 15}.*")
print("torch_needs=(" + " ".join(f"'{need}'" for need in torch_needs) + ")")
print("plain_needs=(" + " ".join(f"'{need}'" for module, need in plain.items() if not have(module)) + ")")
EOF
)"
torch_needs=() plain_needs=()
eval "$efficientdet_missing"
if [ "${#torch_needs[@]}" -gt 0 ]; then
    python3 -m pip install --quiet --no-deps "${torch_needs[@]}"
fi
if [ "${#plain_needs[@]}" -gt 0 ]; then
    # the NumPy that the image's torch was built for stays too
    efficientdet_keep="$(mktemp)"
    python3 -m pip list --format=freeze --disable-pip-version-check | grep -E '^numpy==' >"$efficientdet_keep" || true
    python3 -m pip install --quiet --constraint "$efficientdet_keep" "${plain_needs[@]}"
    rm -f "$efficientdet_keep"
fi
unset efficientdet_missing efficientdet_keep torch_needs plain_needs
