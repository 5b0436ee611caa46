//! The embedded base: a Llama with 0.92 M parameters in bf16 and its tokenizer, as the files of a model folder. The files
//! were made by src/quickstart/python/make_base.py, as made.json records. It does not depend on the code that reads them. Read
//! `model_files/mod.rs` for that.

/// The files of a model folder.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedBase {
    /// config.json
    pub config: &'static str,
    /// generation_config.json
    pub generation_config: &'static str,
    /// tokenizer.json
    pub tokenizer: &'static str,
    /// tokenizer_config.json, with the chat template
    pub tokenizer_config: &'static str,
    /// model.safetensors, aligned to 64 bytes so that tensors can be read in place as from a mapped file
    pub weights: &'static [u8],
}

#[repr(C, align(64))]
struct Aligned<B: ?Sized>(B);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("assets/base/model.safetensors"));

/// The quickstart's base.
pub const BASE: EmbeddedBase = EmbeddedBase {
    config: include_str!("assets/base/config.json"),
    generation_config: include_str!("assets/base/generation_config.json"),
    tokenizer: include_str!("assets/base/tokenizer.json"),
    tokenizer_config: include_str!("assets/base/tokenizer_config.json"),
    weights: &WEIGHTS.0,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::task::{Split, pairs, sft_rows};
    use safetensors::{Dtype, SafeTensors};
    use serde_json::Value;
    use tokenizers::Tokenizer;

    fn config() -> Value {
        serde_json::from_str(BASE.config).unwrap()
    }

    fn tokenizer() -> Tokenizer {
        BASE.tokenizer.parse().unwrap()
    }

    #[test]
    fn weights_are_bf16_aligned_and_have_the_shapes_of_the_config() {
        assert_eq!(BASE.weights.as_ptr() as usize % 64, 0);
        let tensors = SafeTensors::deserialize(BASE.weights).unwrap();
        assert!(tensors.tensors().iter().all(|(_, t)| t.dtype() == Dtype::BF16));
        let c = config();
        let size = |key: &str| c[key].as_u64().unwrap() as usize;
        let (d, f) = (size("hidden_size"), size("intermediate_size"));
        let (q, kv) = (size("num_attention_heads") * size("head_dim"), size("num_key_value_heads") * size("head_dim"));
        let mut expected = vec![
            ("model.embed_tokens.weight".to_owned(), vec![size("vocab_size"), d]),
            ("model.norm.weight".into(), vec![d]),
        ];
        for layer in 0..size("num_hidden_layers") {
            let own = |name: &str| format!("model.layers.{layer}.{name}.weight");
            expected.extend([
                (own("input_layernorm"), vec![d]),
                (own("post_attention_layernorm"), vec![d]),
                (own("self_attn.q_proj"), vec![q, d]),
                (own("self_attn.k_proj"), vec![kv, d]),
                (own("self_attn.v_proj"), vec![kv, d]),
                (own("self_attn.o_proj"), vec![d, q]),
                (own("mlp.gate_proj"), vec![f, d]),
                (own("mlp.up_proj"), vec![f, d]),
                (own("mlp.down_proj"), vec![d, f]),
            ]);
        }
        assert_eq!(tensors.len(), expected.len());
        for (name, shape) in expected {
            assert_eq!(tensors.tensor(&name).unwrap().shape(), shape, "{name}");
        }
    }

    #[test]
    fn embedding_matrix_has_exactly_one_row_per_token() {
        let tokenizer = tokenizer();
        assert_eq!(config()["vocab_size"], tokenizer.get_vocab_size(true));
        assert_eq!((tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|pad|>")), (Some(0), Some(1)));
    }

    #[test]
    fn every_answer_round_trips_through_the_tokenizer_and_fits_the_context() {
        let tokenizer = tokenizer();
        let limit = config()["max_position_embeddings"].as_u64().unwrap() as usize;
        for x in sft_rows(3, 400, Split::Train) {
            let text = format!("{}{}", x.row.prompt, x.response);
            let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
            assert!(ids.len() < limit, "{}", ids.len());
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn prompt_and_answer_tokenise_separately_as_they_do_together() {
        let tokenizer = tokenizer();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        for x in pairs(3, 200, 15, Split::HeldOut) {
            let apart = [ids(&x.row.prompt), ids(&x.chosen)].concat();
            assert_eq!(ids(&format!("{}{}", x.row.prompt, x.chosen)), apart);
        }
    }

    #[test]
    fn chat_template_renders_exactly_the_task_prompt() {
        let settings: Value = serde_json::from_str(BASE.tokenizer_config).unwrap();
        let mut env = minijinja::Environment::new();
        env.add_template("chat", settings["chat_template"].as_str().unwrap()).unwrap();
        let template = env.get_template("chat").unwrap();
        let x = &sft_rows(3, 1, Split::Train)[0];
        let user = minijinja::context! { role => "user", content => x.row.question() };
        let assistant = minijinja::context! { role => "assistant", content => x.response.trim_start() };
        let render = |messages: &[minijinja::Value], add_generation_prompt: bool| {
            let eos_token = "<|endoftext|>";
            template.render(minijinja::context! { messages, add_generation_prompt, eos_token }).unwrap()
        };
        assert_eq!(render(std::slice::from_ref(&user), true), x.row.prompt);
        let dialogue = format!("{}{}<|endoftext|>", x.row.prompt, x.response);
        assert_eq!(render(&[user, assistant], false), dialogue);
    }
}
