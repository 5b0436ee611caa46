//! Exact rational numbers, and the decimals, fractions, mixed numbers and powers of ten that are read as them. It does not
//! depend on units or lists: read `value.rs` for those.

use std::sync::LazyLock;

use regex::Regex;

/// A fraction in lowest terms with a positive denominator. Both parts have at most 38 digits; what needs more is no number
/// here, and is compared as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rational {
    numerator: i128,
    denominator: i128,
}

impl Rational {
    /// `None` if the denominator is 0, or a sign cannot be turned.
    fn new(numerator: i128, denominator: i128) -> Option<Self> {
        let (mut a, mut b) = (numerator.checked_abs()?, denominator.checked_abs()?);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let divisor = match denominator {
            0 => return None,
            1.. => a,
            _ => -a,
        };
        Some(Self { numerator: numerator / divisor, denominator: denominator / divisor })
    }

    pub(super) fn times(self, other: Self) -> Option<Self> {
        // Lowest terms across, so that no product is larger than it must be.
        let (a, b) = (Self::new(self.numerator, other.denominator)?, Self::new(other.numerator, self.denominator)?);
        Self::new(a.numerator.checked_mul(b.numerator)?, a.denominator.checked_mul(b.denominator)?)
    }

    fn over(self, other: Self) -> Option<Self> {
        self.times(Self::new(other.denominator, other.numerator)?)
    }

    fn plus(self, other: Self) -> Option<Self> {
        let (a, b) = (self.numerator.checked_mul(other.denominator)?, other.numerator.checked_mul(self.denominator)?);
        Self::new(a.checked_add(b)?, self.denominator.checked_mul(other.denominator)?)
    }

    /// 10 to the power of `exponent`.
    pub(super) fn power_of_ten(exponent: i32) -> Option<Self> {
        let power = 10i128.checked_pow(exponent.unsigned_abs())?;
        if exponent < 0 { Self::new(1, power) } else { Self::new(power, 1) }
    }
}

const DECIMAL: &str = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)";

static SCALED: LazyLock<Regex> = LazyLock::new(|| {
    let times = r"\s*(?:\\times|\\cdot|×|\*)\s*";
    let power = r"10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))";
    Regex::new(&format!(r"^(?:({DECIMAL})[eE]([-+]?\d+)|(?:({DECIMAL}){times})?{power}|({DECIMAL}))$"))
        .expect("a valid pattern")
});
static FRACTION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))$").expect("a valid pattern"));
static MIXED: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^(\d+)(?:\s+(\d+\s*/\s*\d+)|\s*(\\frac.*))$").expect("a valid pattern"));

/// The number that a text without units writes; `None` if it is no number.
pub(super) fn number(text: &str) -> Option<Rational> {
    let text = text.trim();
    let (is_negative, magnitude) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest.trim_start()),
        None => (false, text),
    };
    let one = if is_negative { Rational::new(-1, 1) } else { Rational::new(1, 1) };
    unsigned(magnitude)?.times(one?)
}

fn unsigned(text: &str) -> Option<Rational> {
    if text.starts_with(['-', '+']) {
        return None;
    }
    if let Some(mixed) = MIXED.captures(text) {
        let fraction = mixed.get(2).or_else(|| mixed.get(3))?;
        return scaled(&mixed[1])?.plus(fraction_of(fraction.as_str())?);
    }
    scaled(text).or_else(|| fraction_of(text))
}

/// `\frac{a}{b}` or a/b, of decimals.
fn fraction_of(text: &str) -> Option<Rational> {
    if let Some(parts) = FRACTION.captures(text) {
        let part = |braced, bare| parts.get(braced).or_else(|| parts.get(bare)).map(|part| part.as_str());
        return scaled(part(1, 2)?.trim())?.over(scaled(part(3, 4)?.trim())?);
    }
    let (above, below) = text.split_once('/')?;
    let bare = |part: &str| part.trim().trim_start_matches('(').trim_end_matches(')').to_owned();
    scaled(&bare(above))?.over(scaled(&bare(below))?)
}

/// A decimal, by itself or times a power of ten.
fn scaled(text: &str) -> Option<Rational> {
    let found = SCALED.captures(text)?;
    let get = |group: usize| found.get(group).map(|found| found.as_str());
    let mantissa = match get(1).or_else(|| get(3)).or_else(|| get(6)) {
        Some(text) => decimal(text)?,
        None => Rational::new(1, 1)?,
    };
    match get(2).or_else(|| get(4)).or_else(|| get(5)) {
        None => Some(mantissa),
        Some(exponent) => mantissa.times(Rational::power_of_ten(exponent.parse().ok()?)?),
    }
}

fn decimal(text: &str) -> Option<Rational> {
    let text = text.replace(',', "");
    let (whole, part) = text.split_once('.').unwrap_or((&text, ""));
    let part = part.trim_end_matches('0');
    let digits: i128 = format!("{whole}{part}")
        .parse()
        .or_else(|error| match whole.trim_start_matches(['-', '+']) {
            "" if part.is_empty() => Ok(0),
            _ => Err(error),
        })
        .ok()?;
    Rational::new(digits, 1)?.times(Rational::power_of_ten(-i32::try_from(part.len()).ok()?)?)
}
