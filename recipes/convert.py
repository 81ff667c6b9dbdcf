"""Makes a folder that recipes open of weights that timm and open_clip publish.

    python recipes/convert.py timm model.safetensors converted/vit-b-16-augreg-in21k
    python recipes/convert.py open_clip model.safetensors converted/clip-vit-b-16-laion400m

Where to get the files says recipes/paper/README.md.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from mllm_cl.model.open_clip import clip_model
from mllm_cl.model.timm_vit import vit_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("timm", "open_clip"))
    parser.add_argument("weights", type=Path, metavar="FILE", help="a .safetensors file")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tokenizer",
        default="openai/clip-vit-base-patch16",
        help="of a CLIP: a folder or a name on the hub",
    )
    args = parser.parse_args()
    tensors = load_file(args.weights)
    model = vit_model(tensors) if args.kind == "timm" else clip_model(tensors)
    model.save_pretrained(args.folder)
    if args.kind == "open_clip":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.folder)
    number = sum(one.numel() for one in model.parameters())
    print(f"{args.folder}: {type(model).__name__} with {number:,} parameters")


if __name__ == "__main__":
    main()
