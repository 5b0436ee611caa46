//! A table of right and wrong answers in the forms of GSM8K and MATH.

use serde_json::json;

use super::extract::{final_answer, reference};
use super::*;
use crate::model::generate::{FinishReason, Response};

/// A response and the column of its record that it must equal.
const RIGHT: &[(&str, &str)] = &[
    // GSM8K: the column holds the solution and the answer after "####".
    ("16 - 3 - 4 = 9 eggs. 9 * 2 = 18.\n#### 18", "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18"),
    ("The total is $70,000", "He made a profit of 200000-130000=$<<70000=70000>>70,000\n#### 70000"),
    ("The answer is 540 meters.", "#### 540"),
    ("so she pays $64.00 in all.", "#### 64"),
    ("The answer is **1,234,567**.", "1234567"),
    ("#### 5 apples", "5"),
    ("####\n7", "7"),
    ("Final answer: 42", "42"),
    ("We get 5-3", "3"),
    ("It dropped to -12", "-12"),
    ("It dropped to −12 degrees", "-12"),
    ("10 / 4 = 2.5", "5/2"),
    ("First \\boxed{3}, no: \\boxed{4}. #### 3", "4"),
    ("it is \\boxed{4} and \\boxed{5", "4"),
    // MATH: the column holds a solution with \boxed, or the answer itself.
    ("$\\boxed{\\frac{1}{2}}$", "Hence the probability is $\\boxed{\\dfrac{1}{2}}$."),
    ("\\boxed{0.5}", "\\frac12"),
    ("\\boxed{\\frac{3}{-6}}", "-\\frac{1}{2}"),
    ("\\boxed{-\\tfrac{14}{3}}", "-14/3"),
    ("\\boxed{1\\frac{3}{4}}", "\\frac{7}{4}"),
    ("\\boxed{1 3/4}", "1.75"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{50\\%}", "50"),
    ("\\boxed{50\\%}", "\\frac{1}{2}"),
    ("\\boxed{0.25}", "25\\%"),
    ("\\boxed{12 \\text{ cm}^2}", "12"),
    ("\\boxed{30^\\circ}", "30"),
    ("\\boxed{30}", "30^{\\circ}"),
    ("\\boxed{45°}", "45"),
    ("\\boxed{10\\text{ miles per hour}}", "10"),
    ("\\boxed{9.8 m/s^2}", "9.8"),
    ("\\boxed{5cm}", "5"),
    ("\\boxed{5 sec}", "5"),
    ("She has 8 quarters", "8"),
    ("#### 8 quarters", "8"),
    ("\\boxed{\\$18.90}", "18.9"),
    ("\\boxed{10,\\!080}", "10080"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{3 \\times 10^{4}}", "30000"),
    ("\\boxed{2.5e-3}", "0.0025"),
    ("\\boxed{10^6}", "1,000,000"),
    ("\\boxed{(3, -2)}", "\\left( 3,-2 \\right)"),
    ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "(3,\\frac{\\pi}{2})"),
    ("\\boxed{(0.5, 2)}", "\\left(\\frac{1}{2},2\\right)"),
    ("\\boxed{[0, 1)}", "[0,1)"),
    ("\\boxed{(-\\infty, 2]}", "(-\\infty,2]"),
    ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
    ("\\boxed{-2, 3}", "3,-2"),
    ("\\boxed{1 \\text{ or } -1}", "-1, 1"),
    ("\\boxed{1, 2, and 3}", "1,2,3"),
    ("\\boxed{1,000, 2,000}", "2000, 1000"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
    ("\\boxed{evelyn}", "Evelyn"),
    ("\\boxed{(C)}", "\\text{(C)}"),
    ("\\boxed{2\\sqrt{3}}", "2\\sqrt3"),
    ("\\boxed{x^{2} + 1}", "x^2+1"),
    ("\\boxed{+7.0}", "7"),
    ("\\boxed{.5}", "0.50"),
    ("\\boxed 8", "8"),
    ("\\[ \\fbox{11} \\]", "11"),
    // 40 digits are no number here, and equal as text.
    ("\\boxed{1234567890123456789012345678901234567890}", "1234567890123456789012345678901234567890"),
];

const WRONG: &[(&str, &str)] = &[
    ("", "1"),
    ("I do not know.", "1"),
    ("The answer is 19.", "#### 18"),
    ("18 eggs, then she sells 9", "#### 18"),
    ("#### 18\nNo, wait.\n#### 19", "#### 18"),
    ("\\boxed{19} #### 18", "18"),
    ("\\boxed{", "0"),
    ("\\boxed{}", "0"),
    ("\\boxed{0.333}", "\\frac13"),
    ("\\boxed{\\frac{1}{3}}", "0.33"),
    ("\\boxed{\\frac{2}{1}}", "\\frac12"),
    ("\\boxed{\\frac{1}{0}}", "0"),
    ("\\boxed{-5}", "5"),
    ("\\boxed{--5}", "5"),
    ("\\boxed{5x}", "5"),
    ("\\boxed{5\\pi}", "5"),
    ("\\boxed{5 pi}", "5"),
    ("\\boxed{2 sin}", "2"),
    ("\\boxed{5m}", "5"),
    ("\\boxed{3 squared}", "3"),
    ("\\boxed{5 million}", "5"),
    ("\\boxed{2 \\text{ dozen eggs}}", "2"),
    ("\\boxed{5}", "50\\%"),
    ("\\boxed{0.5\\%}", "0.5\\% of nothing"),
    ("\\boxed{1.234}", "1,234"),
    ("\\boxed{(1,234)}", "1234"),
    ("\\boxed{1,23}", "123"),
    ("\\boxed{3 \\times 10^{4}}", "3000"),
    ("\\boxed{(3, -2)}", "(-2, 3)"),
    ("\\boxed{(0, 1)}", "[0, 1)"),
    ("\\boxed{(1, 2)}", "1, 2"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2, 3\\}"),
    ("\\boxed{\\{1, 2, 3\\}}", "\\{1, 2\\}"),
    ("\\boxed{1}", "1, 2"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Carla}"),
    ("\\boxed{a}", "A"),
    ("\\boxed{x^2+1}", "x^2-1"),
    ("\\boxed{2\\sqrt{3}}", "2\\sqrt{5}"),
    ("\\boxed{1234567890123456789012345678901234567890}", "1234567890123456789012345678901234567891"),
];

#[test]
fn every_right_answer_passes_and_every_wrong_one_fails() {
    let failed: Vec<_> = RIGHT.iter().filter(|(response, reference)| !is_right(response, reference)).collect();
    assert!(failed.is_empty(), "right, and refused: {failed:#?}");
    let passed: Vec<_> = WRONG.iter().filter(|(response, reference)| is_right(response, reference)).collect();
    assert!(passed.is_empty(), "wrong, and passed: {passed:#?}");
}

#[test]
fn an_answer_of_ten_thousand_brackets_is_a_text() {
    let deep = format!("\\boxed{{{}5{}}}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(!is_right(&deep, "5") && is_right(&deep, &deep));
}

#[test]
fn what_is_no_answer_is_none() {
    assert_eq!(final_answer("no number"), None);
    assert_eq!(final_answer("The answer is x. It has 3 roots"), Some("x"));
    assert_eq!(final_answer("3.14 is pi, to 1/3 of a percent"), Some("1/3"));
    assert_eq!(final_answer("\\boxed{\\frac{1}{\\sqrt{2}}}."), Some("\\frac{1}{\\sqrt{2}}"));
    assert_eq!(reference(" Paris "), " Paris ");
}

fn record(columns: serde_json::Value) -> RecordColumns {
    RecordColumns { id: json!("data.jsonl:3"), columns: columns.as_object().unwrap().clone() }
}

#[test]
fn answers_come_from_the_records_column() {
    let columns: Columns =
        [(0, record(json!({"answer": 7}))), (4, record(json!({"answer": "#### 1,000"})))].into_iter().collect();
    let source = MathReward::new(&columns, COLUMN).unwrap();
    let responses: Vec<Response> = [7, 1000, 7]
        .map(|token| Response { tokens: vec![token, 0], logprobs: vec![0.0; 2], finish: FinishReason::Stop })
        .into();
    let prompts = vec![vec![1]; 3];
    let decode = |tokens: &[u32]| format!("It is {}", tokens[0]);
    let inputs =
        RewardInputs { prompts: &prompts, responses: &responses, entries: &[0, 4, 4], decode: &decode, known: &[] };
    assert_eq!(source.scores(&inputs).unwrap(), [1.0, 1.0, 0.0]);
    let error = source.scores(&RewardInputs { entries: &[], ..inputs }).unwrap_err().to_string();
    assert!(error.contains("no right answer for a prompt"), "{error}");
}

#[test]
fn a_record_without_the_column_is_one_error_with_its_name_and_columns() {
    for (columns, says) in [
        (json!({"prompt": "a", "solution": "b"}), "has no such column"),
        (json!({"prompt": "a", "answer": null, "solution": 1}), "holds null there"),
    ] {
        let error = MathReward::new(&Columns::from([(2, record(columns))]), "answer").unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("\"data.jsonl:3\""), "{error}");
        assert!(error.contains("\"prompt\"") && error.contains("\"solution\""), "{error}");
    }
}
