//! The replies of model servers about sequences: where the numbers are, in which order, and which of them is the score. It does
//! not depend on how a server is reached. Read `served.rs` for the requests.

use serde_json::Value;

use super::retry::{Failure, excerpt, score_of};
use super::served::Dialect;

/// Responses from which on a probability of exactly 1 for all of them is no chance.
const NO_CHANCE: usize = 4;

impl Dialect {
    /// The name of the numbers in an entry of the reply; empty where the entry is the numbers.
    fn field(self) -> &'static str {
        match self {
            Self::Classify => "probs",
            Self::Pooling => "data",
            Self::Score => "score",
            Self::SglangClassify => "embedding",
            Self::SglangScore => "",
        }
    }

    /// The list of entries, one per sequence.
    fn entries(self, reply: &Value) -> Option<&[Value]> {
        let list = match self {
            Self::Classify | Self::Pooling | Self::Score => reply.get("data"),
            // One sequence is replied to without a list.
            Self::SglangClassify if reply["embedding"].is_array() => return Some(std::slice::from_ref(reply)),
            Self::SglangClassify => Some(reply),
            Self::SglangScore => reply.get("scores"),
        };
        list.and_then(Value::as_array).map(Vec::as_slice)
    }
}

/// The text of an error object, as OpenAI's, vLLM's, SGLang's and FastAPI's replies have it.
pub(super) fn error_text(reply: &Value) -> Option<&str> {
    let is_error = reply["object"].as_str() == Some("error");
    let nested = reply["error"]["message"].as_str().or(reply["error"].as_str());
    nested.or(reply["message"].as_str().filter(|_| is_error)).or(reply["detail"].as_str())
}

/// (B) scores of `count` sequences, in the order of the request; `None` for what is no finite number. `index`: which number of a
/// list is the score.
///
/// # Errors
/// If the reply is an error or of another dialect (another try may succeed), or a list's number is not said (none can).
pub(super) fn scores(
    dialect: Dialect,
    reply: &Value,
    count: usize,
    index: Option<usize>,
) -> Result<Vec<Option<f32>>, Failure> {
    if let Some(text) = error_text(reply) {
        return Err(Failure::Passing(format!("its reply is an error: {}", excerpt(text))));
    }
    let entries = match dialect.entries(reply) {
        Some(entries) => entries,
        None => {
            let place = match dialect {
                Dialect::SglangClassify => "list of objects with \"embedding\"".to_owned(),
                Dialect::SglangScore => "list \"scores\"".to_owned(),
                _ => format!("list \"data\" of objects with {:?}", dialect.field()),
            };
            return Err(Failure::Passing(format!("its reply has no {place}: {}", excerpt(&reply.to_string()))));
        }
    };
    if entries.len() != count {
        return Err(Failure::another_count(entries.len(), count));
    }
    let mut scores = vec![None; count];
    let mut filled = vec![false; count];
    for (place, entry) in entries.iter().enumerate() {
        let at = match &entry["index"] {
            Value::Null => place,
            at => at.as_u64().map_or(count, |at| at as usize),
        };
        if at >= count || std::mem::replace(&mut filled[at], true) {
            return Err(Failure::Passing(format!("its reply has index {} twice or beyond {count}", entry["index"])));
        }
        let value = if dialect.field().is_empty() { Some(entry) } else { entry.get(dialect.field()) };
        // A null is a score that the model did not have; without the key the reply is of another dialect.
        let Some(value) = value else {
            let (field, found) = (dialect.field(), excerpt(&entry.to_string()));
            return Err(Failure::Passing(format!("an entry of its reply has no numbers in {field:?}: {found}")));
        };
        scores[at] = number(dialect, value, index)?;
    }
    let ones = scores.iter().all(|&score| score == Some(1.0));
    if dialect == Dialect::Classify && ones && count >= NO_CHANCE && entries.iter().all(|e| is_alone(&e["probs"])) {
        return Err(Failure::Final(
            "each response has probability 1 of the only class: the server applies a softmax to a single number; ask SGLang at \
             /classify with api = \"sglang_classify\", or vLLM at /pooling with api = \"pooling\""
                .into(),
        ));
    }
    Ok(scores)
}

fn is_alone(list: &Value) -> bool {
    list.as_array().is_some_and(|list| list.len() == 1)
}

/// The score among an entry's numbers.
fn number(dialect: Dialect, value: &Value, index: Option<usize>) -> Result<Option<f32>, Failure> {
    let Value::Array(list) = value else {
        if value.is_number() || (value.is_null() && dialect == Dialect::Score) {
            return Ok(score_of(value));
        }
        let name = if dialect.field().is_empty() { "scores" } else { dialect.field() };
        let more = if value.is_string() { "; add request = { encoding_format = \"float\" }" } else { "" };
        return Err(Failure::Passing(format!(
            "an entry of its reply has no numbers in {name:?}: {}{more}",
            excerpt(&value.to_string())
        )));
    };
    // One list per token: a sequence's score is that of its last token.
    if list.first().is_some_and(Value::is_array) {
        return number(dialect, list.last().unwrap_or(&Value::Null), index);
    }
    match index {
        None if list.len() == 1 => Ok(score_of(&list[0])),
        Some(index) if index < list.len() => Ok(score_of(&list[index])),
        None => Err(Failure::Final(format!(
            "its reply has {} numbers per response: {}; say which one is the score by score_index = 0, 1, …",
            list.len(),
            excerpt(&value.to_string())
        ))),
        Some(index) => {
            Err(Failure::Final(format!("its reply has {} numbers per response, and score_index = {index}", list.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(dialect: Dialect, reply: Value, count: usize) -> Result<Vec<Option<f32>>, Failure> {
        scores(dialect, &reply, count, None)
    }

    fn fault(found: Result<Vec<Option<f32>>, Failure>) -> (String, bool) {
        match found.unwrap_err() {
            Failure::Passing(text) | Failure::Unscored(text) => (text, true),
            Failure::Final(text) => (text, false),
        }
    }

    #[test]
    fn each_dialects_numbers_are_found_in_the_order_of_the_request() {
        let entry = |index: usize, key: &str, value: Value| json!({ "index": index, "object": "x", key: value });
        let data = |key: &str, values: [Value; 2]| {
            let [first, second] = values;
            // The second sequence's entry comes first.
            json!({ "object": "list", "model": "m", "data": [entry(1, key, second), entry(0, key, first)] })
        };
        let want = Ok(vec![Some(1.5), Some(-0.25)]);
        assert_eq!(of(Dialect::Classify, data("probs", [json!([1.5]), json!([-0.25])]), 2), want);
        assert_eq!(of(Dialect::Pooling, data("data", [json!([1.5]), json!([-0.25])]), 2), want);
        assert_eq!(of(Dialect::Pooling, data("data", [json!([[9], [1.5]]), json!([[-0.25]])]), 2), want, "last token");
        assert_eq!(of(Dialect::Score, data("score", [json!(1.5), json!(-0.25)]), 2), want);
        let embeddings = json!([{ "embedding": [1.5], "meta_info": {} }, { "embedding": [-0.25], "meta_info": {} }]);
        assert_eq!(of(Dialect::SglangClassify, embeddings.clone(), 2), want);
        assert_eq!(of(Dialect::SglangClassify, embeddings[0].clone(), 1), Ok(vec![Some(1.5)]), "without a list");
        assert_eq!(of(Dialect::SglangScore, json!({ "scores": [[1.5], [-0.25]], "object": "scoring" }), 2), want);
    }

    #[test]
    fn of_several_numbers_the_config_says_which() {
        let reply = json!({ "data": [{ "index": 0, "probs": [0.25, 0.75], "num_classes": 2 }] });
        let (text, passes) = fault(of(Dialect::Classify, reply.clone(), 1));
        assert!(!passes && text.contains("2 numbers per response: \"[0.25,0.75]\"") && text.contains("score_index"));
        assert_eq!(scores(Dialect::Classify, &reply, 1, Some(1)), Ok(vec![Some(0.75)]));
        let (text, passes) = fault(scores(Dialect::Classify, &reply, 1, Some(2)));
        assert!(!passes && text.contains("score_index = 2"), "{text}");
    }

    #[test]
    fn a_softmax_over_one_number_is_no_reward() {
        let entries = |n: usize, p: f64| (0..n).map(|i| json!({ "index": i, "probs": [p] })).collect::<Vec<_>>();
        let (text, passes) = fault(of(Dialect::Classify, json!({ "data": entries(4, 1.0) }), 4));
        assert!(!passes && text.contains("sglang_classify"), "{text}");
        assert_eq!(of(Dialect::Classify, json!({ "data": entries(4, 0.5) }), 4), Ok(vec![Some(0.5); 4]));
        assert_eq!(of(Dialect::Classify, json!({ "data": entries(3, 1.0) }), 3), Ok(vec![Some(1.0); 3]));
    }

    #[test]
    fn a_wrong_reply_is_a_fault_that_says_what_is_wrong() {
        let twice = json!({ "data": [{ "index": 0, "score": 1 }, { "index": 0, "score": 2 }] });
        let beyond = json!({ "data": [{ "index": 0, "score": 1 }, { "index": 2, "score": 2 }] });
        for (reply, said) in [
            (json!({ "error": { "message": "The model `x` does not exist.", "code": 404 } }), "The model `x` does not"),
            (json!({ "object": "error", "message": "too long" }), "its reply is an error: \"too long\""),
            (json!({ "detail": "Not Found" }), "Not Found"),
            (json!({ "scores": [1, 2] }), "no list \"data\" of objects with \"score\""),
            (json!({ "data": [{ "index": 0, "score": 1 }] }), "it returned 1 score for 2 responses"),
            (twice, "index 0 twice or beyond 2"),
            (beyond, "index 2 twice or beyond 2"),
            (json!({ "data": [{ "data": "AACAPw==" }, { "data": "AACAPw==" }] }), "no numbers in \"score\""),
        ] {
            let (text, passes) = fault(of(Dialect::Score, reply, 2));
            assert!(passes && text.contains(said), "{said}: {text}");
        }
        let (text, _) = fault(of(Dialect::Pooling, json!({ "data": [{ "data": "AACAPw==" }] }), 1));
        assert!(text.contains("encoding_format"), "{text}");
        let (text, _) = fault(of(Dialect::SglangClassify, json!({ "data": [] }), 1));
        assert!(text.contains("list of objects with \"embedding\""), "{text}");
        let (text, _) = fault(of(Dialect::SglangScore, json!([]), 1));
        assert!(text.contains("no list \"scores\""), "{text}");
        // No number at all is a bad score, which the retry policy counts.
        assert_eq!(of(Dialect::Score, json!({ "data": [{ "index": 0, "score": null }] }), 1), Ok(vec![None]));
        assert_eq!(of(Dialect::Classify, json!({ "data": [{ "index": 0, "probs": [null] }] }), 1), Ok(vec![None]));
    }
}
