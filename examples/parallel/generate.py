"""Text from a model that several GPUs (or CPU processes) share; start it with torchrun.

    torchrun --nproc-per-node 4 examples/parallel/generate.py path/to/MiMo-V2.5 --prompt "Hello" --mtp
    torchrun --nproc-per-node 8 examples/parallel/generate.py path/to/MiMo-V2.5 --prompt "Hello" --replicate-attention

Attention is shared out by QKV chunks, of which MiMo-V2.5 has 4: more ranks keep attention whole and share the experts.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.distributed import DistributedConfig

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.parallel_mimo_v2 import replicated_attention


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder or repository of a checkpoint, as released or converted")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tensor-experts", action="store_true", help="cut each expert instead of sharing whole ones")
    parser.add_argument("--replicate-attention", action="store_true", help="attention whole on every rank")
    parser.add_argument("--dequantize", action="store_true", help="bfloat16 weights instead of FP8 ones in memory")
    parser.add_argument("--mtp", action="store_true", help="draft with the MTP heads")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args()


def load(arguments: argparse.Namespace, ranks: int):
    config = AutoConfig.from_pretrained(arguments.path)
    plan = replicated_attention(config) if arguments.replicate_attention else "auto"
    degrees = DistributedConfig(tp_size=ranks, tp_plan=plan, ep_size=1 if arguments.tensor_experts else ranks)
    options = {}
    # bf16 checkpoints have no entry; the rest of a released one is read with it
    if "quantization_config" in config.to_dict():
        options["quantization_config"] = MiMoV2FP8Config(dequantize=arguments.dequantize)
    return AutoModelForCausalLM.from_pretrained(
        arguments.path, dtype=torch.bfloat16, distributed_config=degrees, **options
    )


def main() -> None:
    arguments = parse_arguments()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    tokenizer = AutoTokenizer.from_pretrained(arguments.path)
    model = load(arguments, ranks)
    messages = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    # every rank has to choose the same tokens, also where the checkpoint's settings sample
    set_seed(0)
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, use_mtp=arguments.mtp)
    if rank == 0:
        print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
