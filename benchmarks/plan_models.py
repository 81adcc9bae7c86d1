"""Machines, models, and the combinations that plan.py publishes; configs by their numbers, since no hub is needed."""

FABRIC = {"shard": 50e9, "replicate": 50e9, "tp": 450e9}  # bytes/s of an H100: InfiniBand NDR 400 Gb/s; NVLink 4


def qwen3(layers, hidden, inner, heads, kv, tied=False, **experts):
    return {"model_type": "qwen3_moe" if experts else "qwen3", "num_hidden_layers": layers, "hidden_size": hidden,
            "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128,
            "vocab_size": 151936, "tie_word_embeddings": tied, **experts}


def llama3(layers, hidden, inner, heads):
    return {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
            "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}


# name -> parameters as published, in 1e9, and config.json, both from the model's page: huggingface.co/Qwen,
# /meta-llama, /deepseek-ai (whose numbers are transformers' defaults; 671 without the layer for multi-token prediction)
MODELS = {
    "Qwen3-0.6B": (0.6, qwen3(28, 1024, 3072, 16, 8, tied=True)),
    "Qwen3-1.7B": (1.7, qwen3(28, 2048, 6144, 16, 8, tied=True)),
    "Qwen3-8B": (8.2, qwen3(36, 4096, 12288, 32, 8)),
    "Llama-3.1-8B": (8.03, llama3(32, 4096, 14336, 32)),
    "Qwen3-32B": (32.8, qwen3(64, 5120, 25600, 64, 8)),
    "Llama-3.3-70B": (70.6, llama3(80, 8192, 28672, 64)),
    "Qwen3-30B-A3B": (30.5, qwen3(48, 2048, 6144, 32, 4, num_experts=128, num_experts_per_tok=8,
                                  moe_intermediate_size=768)),
    "Qwen3-235B-A22B": (235, qwen3(94, 4096, 12288, 64, 4, num_experts=128, num_experts_per_tok=8,
                                   moe_intermediate_size=1536)),
    "DeepSeek-V3": (671, {"model_type": "deepseek_v3"}),
}  # fmt: skip
# as sold, in bytes: but for the last, drivers show some 7 % more, which NCCL and CUDA use (B300: 288 less these)
GPUS = {"H100": 80e9, "H200": 141e9, "B200": 180e9, "B300": 270e9}
TABLE = (  # model, gpus, tp_size, replicate_size; each for every script of OFFLINE
    ("Qwen3-0.6B", 1, 1, 1), ("Qwen3-1.7B", 1, 1, 1), ("Qwen3-8B", 8, 1, 1), ("Llama-3.1-8B", 8, 1, 1),
    ("Qwen3-32B", 32, 1, 1), ("Qwen3-32B", 32, 4, 1), ("Llama-3.3-70B", 64, 1, 1), ("Llama-3.3-70B", 64, 8, 1),
    ("Qwen3-30B-A3B", 32, 1, 1), ("Qwen3-235B-A22B", 128, 1, 1), ("Qwen3-235B-A22B", 256, 1, 2),
    ("DeepSeek-V3", 256, 1, 1), ("DeepSeek-V3", 1024, 1, 4), ("DeepSeek-V3", 1024, 1, 1),
)  # fmt: skip
OFFLINE = "sft", "dpo"  # an online script's sampling is not planned
