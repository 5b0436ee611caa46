//! DeepSpeed-Chat's rules for `compat = "dschat"`: the rows in each objective's share of the data, and the tokens of a
//! row.
//!
//! The behaviour is that of microsoft/DeepSpeedExamples, DeepSpeed-Chat, `data_utils.py`: a data set's row numbers are
//! shuffled by numpy and cut by `data_split`; prompt, response and end-of-conversation text are tokenised in one piece
//! and truncated at the right, so that a long response loses its end; a long prompt of PPO is dropped. All functions
//! are pure; this file does not depend on the record types. Read `data/examples/compat.rs` next.

use anyhow::{Result, ensure};

use crate::data::examples::encoder::TextEncoder;

/// The text that ends a conversation in reward modelling, encoded as any text is. SFT ends with the tokenizer's own end
/// token.
pub const REWARD_END: &str = "<|endoftext|>";

/// A share of the records, numbered in the order of `data_split`.
#[derive(Clone, Copy)]
pub enum Share {
    /// The share of supervised fine-tuning.
    Sft = 0,
    /// The share of reward modelling.
    Reward = 1,
    /// The share of PPO, for prompts.
    Ppo = 2,
}

/// The Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), seeded and used as in numpy's `RandomState`.
struct MersenneTwister {
    state: [u32; Self::N],
    next: usize,
}

impl MersenneTwister {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: Self::N }
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7FFF_FFFF);
            let odd = if joined & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == Self::N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    /// A uniform number in 0..=most, as numpy's legacy `random_interval` draws it: masked draws until one is in range.
    fn interval(&mut self, most: u32) -> u32 {
        let mask = u32::MAX.checked_shr(most.leading_zeros()).unwrap_or(0);
        loop {
            let drawn = self.next_u32() & mask;
            if drawn <= most {
                return drawn;
            }
        }
    }
}

/// The row numbers 0..size in numpy's order: `np.random.RandomState(seed).shuffle(np.arange(size))`.
///
/// # Errors
/// A seed above 2^32 - 1, which numpy rejects; more than 2^32 - 1 rows.
pub fn shuffled_rows(seed: u64, size: usize) -> Result<Vec<u32>> {
    let numpy_seed = u32::try_from(seed);
    ensure!(
        numpy_seed.is_ok(),
        crate::error::Invalid::new(format!(
            "seed = {seed} is above 4294967295, the largest that compat = \"dschat\" can use: numpy's seeds have 32 bits"
        ))
    );
    let rows = u32::try_from(size).map_err(|_| anyhow::anyhow!("{size} rows are more than 32 bits can count"))?;
    let mut random = MersenneTwister::new(numpy_seed?);
    let mut order: Vec<u32> = (0..rows).collect();
    for i in (1..rows).rev() {
        order.swap(i as usize, random.interval(i) as usize);
    }
    Ok(order)
}

/// The rows of share number `share` (0 = SFT, 1 = reward, 2 = PPO) of a data set of `size` rows, in reading order, cut
/// by `data_split` as in DeepSpeed-Chat: with fractions f_k, end_k = end_(k-1) + round(f_k size), where halves round to
/// even; the difference between the last end and the size is then subtracted from every end.
///
/// # Errors
/// Those of [`shuffled_rows`]; a fraction that is negative, NaN or infinite, or none above 0; no such share.
pub fn share_rows(seed: u64, size: usize, data_split: &[f64], share: usize) -> Result<Vec<u32>> {
    let sum: f64 = data_split.iter().sum();
    ensure!(
        data_split.iter().all(|fraction| fraction.is_finite() && *fraction >= 0.0)
            && sum > 0.0
            && share < data_split.len(),
        crate::error::Invalid::new(format!(
            "data_split has the shares {data_split:?}; use one number of 0 or more per stage, such as \"2,4,4\""
        ))
    );
    let mut ends = vec![0i64];
    for fraction in data_split {
        let rows = (fraction / sum * size as f64).round_ties_even();
        ends.push(ends[ends.len() - 1] + rows as i64);
    }
    let over = ends[ends.len() - 1] - size as i64;
    ends[1..].iter_mut().for_each(|end| *end -= over);
    let order = shuffled_rows(seed, size)?;
    // A negative end counts from the back, as in a Python slice: DeepSpeed-Chat's shares then overlap.
    let index = |end: i64| if end < 0 { (end + size as i64).max(0) } else { end.min(size as i64) } as usize;
    let (from, to) = (index(ends[share]), index(ends[share + 1]));
    Ok(order.get(from..to).unwrap_or_default().to_vec())
}

/// The numbers of a `data_split` such as `"2,4,4"`.
///
/// # Errors
/// A part that is not a number.
pub fn parse_shares(data_split: &str) -> Result<Vec<f64>, String> {
    let part = |part: &str| part.trim().parse::<f64>().map_err(|_| format!("{part:?} is not a number"));
    data_split.split(',').map(part).collect()
}

/// Token ids of `text` followed by `end`, encoded in one piece after the tokenizer's beginning-of-sequence token and
/// truncated at the right to `max_length`: a longer sequence loses its end.
///
/// # Errors
/// Those of the tokenizer.
pub fn sequence(text: &str, end: &str, max_length: usize, encoder: &dyn TextEncoder) -> Result<Vec<u32>> {
    let mut tokens = encoder.front().to_vec();
    tokens.extend(encoder.encode(&format!("{text}{end}"))?);
    tokens.truncate(max_length);
    Ok(tokens)
}

/// Splits the two sequences of a comparison into their common beginning and the rest of each. If one sequence is a
/// prefix of the other, the last common token goes to both rests, so that neither is empty.
pub fn diverge(chosen: Vec<u32>, rejected: Vec<u32>) -> (Vec<u32>, [Vec<u32>; 2]) {
    let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    let shared = shared.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
    (chosen[..shared].to_vec(), [chosen[shared..].to_vec(), rejected[shared..].to_vec()])
}

/// Token ids of a prompt for PPO, or None if there are more than `max_prompt_length`: a long prompt is dropped, not
/// cut.
///
/// # Errors
/// Those of the tokenizer.
pub fn prompt(text: &str, max_prompt_length: usize, encoder: &dyn TextEncoder) -> Result<Option<Vec<u32>>> {
    let tokens = sequence(text, "", usize::MAX, encoder)?;
    Ok((tokens.len() <= max_prompt_length).then_some(tokens))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::chat_template::{Message, Rendered};
    use serde_json::Value;

    fn golden() -> Value {
        // Printed by tests/golden/dschat_split.py.
        serde_json::from_str(include_str!("../../../tests/golden/dschat_split.json")).unwrap()
    }

    fn numbers(list: &Value) -> Vec<u32> {
        serde_json::from_value(list.clone()).unwrap()
    }

    #[test]
    fn shuffled_rows_equal_numpys_golden() {
        let golden = golden();
        for case in golden["shuffles"].as_array().unwrap() {
            let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap());
            assert_eq!(shuffled_rows(seed, size as usize).unwrap(), numbers(&case["rows"]), "seed {seed}, size {size}");
        }
        let big = &golden["big"];
        let rows = shuffled_rows(1234, big["size"].as_u64().unwrap() as usize).unwrap();
        assert_eq!(rows[..3], numbers(&big["first"])[..]);
        let weighed: u64 = rows.iter().zip(1u64..).map(|(&row, place)| u64::from(row) * place).sum();
        assert_eq!(weighed % ((1 << 61) - 1), big["weighed"].as_u64().unwrap());
        assert!(shuffled_rows(1 << 32, 3).unwrap_err().to_string().contains("numpy"));
    }

    #[test]
    fn share_rows_equal_deepspeed_chats_golden() {
        for case in golden()["splits"].as_array().unwrap() {
            let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap() as usize);
            let split = parse_shares(case["split"].as_str().unwrap()).unwrap();
            for (share, expected) in case["phases"].as_array().unwrap().iter().enumerate() {
                let found = share_rows(seed, size, &split, share).unwrap();
                assert_eq!(found, numbers(expected), "{case}, share {share}");
            }
        }
        assert!(parse_shares("2,x").is_err());
        for (split, share) in [(&[0.0, 0.0][..], 0), (&[1.0, -1.0], 0), (&[1.0], 1), (&[f64::NAN], 0)] {
            assert!(share_rows(1, 5, split, share).unwrap_err().to_string().contains("data_split"));
        }
    }

    struct Letters;

    impl TextEncoder for Letters {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.bytes().map(u32::from).collect())
        }

        fn chat(&self, _: &[Message], _: bool) -> Result<Rendered> {
            unreachable!("no template")
        }

        fn has_chat_template(&self) -> bool {
            false
        }

        fn eos_id(&self) -> u32 {
            1
        }

        fn eos_text(&self) -> &str {
            "."
        }

        fn front(&self) -> &[u32] {
            &[0]
        }
    }

    fn tokens(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| if byte == b'^' { 0 } else { byte.into() }).collect()
    }

    #[test]
    fn a_long_sequence_is_truncated_at_the_right_and_a_long_prompt_is_dropped() {
        assert_eq!(sequence(" q a", ".", 9, &Letters).unwrap(), tokens("^ q a."));
        assert_eq!(sequence(" q a", ".", 5, &Letters).unwrap(), tokens("^ q a"));
        assert_eq!(prompt(" q:", 4, &Letters).unwrap(), Some(tokens("^ q:")));
        assert_eq!(prompt(" q:", 3, &Letters).unwrap(), None);
    }

    #[test]
    fn diverge_splits_at_the_first_difference_and_leaves_no_response_empty() {
        for (a, b, prompt, responses) in [
            ("q: yes", "q: no", "q: ", ["yes", "no"]),
            ("q: a", "q: a b", "q: ", ["a", "a b"]),
            ("same", "same", "sam", ["e", "e"]),
        ] {
            let (shared, rest) = diverge(tokens(a), tokens(b));
            assert_eq!((shared, rest), (tokens(prompt), responses.map(tokens)), "{a} / {b}");
        }
    }
}
