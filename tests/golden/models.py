"""Writes models/*.json: the published dimensions of the models that configs/README.md plans, without weights.

Each is what its release's config.json says of the decoder's shape (of Gemma 3 4B: of its text part). Run it in this folder.
"""

import json


def write(name, model_type, hidden, inner, layers, heads, kv, vocab, context, tied, **more):
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **more,
    }
    with open(f"models/{name}.json", "w") as file:
        file.write(json.dumps(config, indent=1) + "\n")


def llama3(factor):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }


SMOL = {"hidden_act": "silu", "rms_norm_eps": 1e-5}
write("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 49152, 8192, True, rope_theta=1e5, **SMOL)
write("smollm2-360m", "llama", 960, 2560, 32, 15, 5, 49152, 8192, True, rope_theta=1e5, **SMOL)
write("smollm2-1.7b", "llama", 2048, 8192, 24, 32, 32, 49152, 8192, True, rope_theta=1.3e5, **SMOL)

QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
write("qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True, **QWEN)
write("qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, True, **QWEN)
write("qwen2.5-3b", "qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True, **QWEN)
write("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, False, **QWEN)
write("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, True, head_dim=128, **QWEN)
write("qwen3-1.7b", "qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, True, head_dim=128, **QWEN)
write("qwen3-4b", "qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, True, head_dim=128, **QWEN)
write("qwen3-8b", "qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, False, head_dim=128, **QWEN)

LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5}
write("llama-3.2-1b", "llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, head_dim=64, rope_scaling=llama3(32.0), **LLAMA)
write("llama-3.2-3b", "llama", 3072, 8192, 28, 24, 8, 128256, 131072, True, head_dim=128, rope_scaling=llama3(32.0), **LLAMA)
write("llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128256, 131072, False, rope_scaling=llama3(8.0), **LLAMA)

GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}
write("gemma-3-270m", "gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, True, sliding_window=512, **GEMMA)
write("gemma-3-1b", "gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, True, sliding_window=512, **GEMMA)
scaled = {"rope_type": "linear", "factor": 8.0}
write("gemma-3-4b", "gemma3_text", 2560, 10240, 34, 8, 4, 262208, 131072, True, sliding_window=1024, rope_scaling=scaled, **GEMMA)
