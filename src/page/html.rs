//! Text as HTML: everything that a run's files hold is shown as text, whatever it is. It does not depend on what is shown.

use std::fmt::Write;

/// Text with the five special characters of HTML replaced, and control characters shown as their pictures (U+2400...), since
/// HTML forbids them.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            c if c.is_control() => picture(c, &mut out),
            c => out.push(c),
        }
    }
    out
}

/// Adds a character that cannot be shown by its picture (U+2400...), or by its number where it has none.
pub(crate) fn picture(c: char, out: &mut String) {
    match u32::from(c) {
        0x7f => out.push('\u{2421}'),
        low @ ..0x20 => out.extend(char::from_u32(0x2400 + low)),
        other => {
            let _ = write!(out, "\\u{{{other:x}}}");
        }
    }
}

/// JSON inside of a script element, which `</script>` or `<!--` in a text must not end.
pub(super) fn json_in_script(value: &serde_json::Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// A number for people: up to four significant digits.
pub(crate) fn short(x: f64) -> String {
    if x == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&x.abs()) {
        return format!("{x:.2e}").replace(".00e", "e");
    }
    let digits = (3 - x.abs().log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A time span for people.
pub(crate) fn span(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => "less than a second".into(),
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 36.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// A table of text cells; the first row is its head.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let mut out = String::from("<div class=wide><table>");
    for (i, row) in rows.iter().enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        out += "<tr>";
        for cell in row {
            let _ = write!(out, "<{tag} dir=auto>{}</{tag}>", escape(cell));
        }
        out += "</tr>";
    }
    out + "</table></div>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_texts_is_shown_and_not_run() {
        assert_eq!(
            escape("<script>alert('x')</script> & \"y\""),
            "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;y&quot;"
        );
        assert_eq!(escape("a\u{0}b\u{1b}[2J\r\n\u{85}"), "a\u{2400}b\u{241b}[2J\u{240d}\n\\u{85}");
        assert_eq!(escape("مرحبا 👩\u{200d}💻"), "مرحبا 👩\u{200d}💻");
        assert_eq!(json_in_script(&"</script><!--".into()), "\"\\u003c/script>\\u003c!--\"");
    }

    #[test]
    fn numbers_and_spans_are_short() {
        let cases =
            [(0.0, "0"), (1.0, "1"), (12.345, "12.35"), (0.012345, "0.01235"), (-12_345.6, "-12346"), (1e-5, "1e-5")];
        for (x, text) in cases {
            assert_eq!(short(x), text);
        }
        assert_eq!(
            (span(0.2), span(45.4), span(840.0)),
            ("less than a second".into(), "45 s".into(), "14 min".to_string())
        );
    }
}
