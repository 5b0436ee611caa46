//! The function `strftime_now`: the date in UTC by the directives of C's strftime that chat templates use.
//!
//! This file does not depend on minijinja. Read `model_files/files.rs` next.

use std::time::{SystemTime, UNIX_EPOCH};

/// `strftime_now(format)` of a template.
pub(super) fn now(format: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0)))
}

/// Formats a time in UTC with the directives of C's strftime that chat templates use. Unknown directives are kept as text.
fn strftime(format: &str, seconds: i64) -> String {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, clock) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let weekday = DAYS[(days + 3).rem_euclid(7) as usize]; // 1970-01-01 was a Thursday
    let month_name = MONTHS[(month - 1) as usize];
    let twelve = (clock / 3600 + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // "%-d" is a number without a leading zero.
        let unpadded = chars.as_str().starts_with('-');
        let directive = if unpadded { chars.nth(1) } else { chars.next() };
        let padded = |number: i64, digits: usize| match unpadded {
            true => number.to_string(),
            false => format!("{number:0digits$}"),
        };
        match directive {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &padded(year % 100, 2),
            Some('m') => out += &padded(month, 2),
            Some('d') => out += &padded(day, 2),
            Some('e') if unpadded => out += &day.to_string(),
            Some('e') => out += &format!("{day:2}"),
            Some('j') => out += &padded(days - days_from_civil(year, 1, 1) + 1, 3),
            Some('B') => out += month_name,
            Some('b' | 'h') => out += &month_name[..3],
            Some('A') => out += weekday,
            Some('a') => out += &weekday[..3],
            Some('u') => out += &((days + 3).rem_euclid(7) + 1).to_string(),
            Some('w') => out += &(days + 4).rem_euclid(7).to_string(),
            Some('H') => out += &padded(clock / 3600, 2),
            Some('I') => out += &padded(twelve, 2),
            Some('p') => out += if clock < 43_200 { "AM" } else { "PM" },
            Some('M') => out += &padded(clock / 60 % 60, 2),
            Some('S') => out += &padded(clock % 60, 2),
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('D') => out += &format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('T') => out += &format!("{:02}:{:02}:{:02}", clock / 3600, clock / 60 % 60, clock % 60),
            Some('R') => out += &format!("{:02}:{:02}", clock / 3600, clock / 60 % 60),
            Some('s') => out += &seconds.to_string(),
            Some('Z') => out += "UTC",
            Some('z') => out += "+0000",
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('%') => out.push('%'),
            Some(other) if unpadded => out.extend(['%', '-', other]),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Days since 1970-01-01 -> (year, month, day) of the Gregorian calendar.
/// Years begin in March here, so that the leap day is the last; 146097 days are 400 years.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// (year, month, day) -> days since 1970-01-01: the inverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_gregorian_calendar() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(strftime("%A %F %H:%M:%S %e %y %q %", 951_782_399), "Monday 2000-02-28 23:59:59 28 00 %q %");
        assert_eq!(strftime("%a %d %B %Y", 951_782_400), "Tue 29 February 2000");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
        assert_eq!(strftime("%-d/%-m %I:%M %p day %j", 1_735_718_400), "1/1 08:00 AM day 001");
        assert_eq!(strftime("%D %T %R %u %w %-I %-q", 951_868_799), "02/29/00 23:59:59 23:59 2 2 11 %-q");
    }
}
