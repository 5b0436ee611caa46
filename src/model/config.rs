//! Sizes of a decoder; reading them from files follows.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
}
impl DecoderConfig {
    #[allow(missing_docs)]
    pub fn inv_freq(&self) -> Vec<f32> {
        (0..self.head_dim / 2).map(|i| 10000f32.powf(-((2 * i) as f32) / self.head_dim as f32)).collect()
    }
}

impl DecoderConfig {
    #[cfg(test)]
    pub(crate) fn tiny_for_tests(v: usize, d: usize, f: usize, l: usize, h: usize, kv: usize, hd: usize) -> Self {
        Self {
            vocab_size: v,
            hidden_size: d,
            intermediate_size: f,
            num_hidden_layers: l,
            num_attention_heads: h,
            num_key_value_heads: kv,
            head_dim: hd,
            max_position_embeddings: 40,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
        }
    }
}
