//! Times as dates, for messages: `2026-11-27 07:46 UTC`. It does not depend on the machine's time zone.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970 as `2026-11-27 07:46 UTC`. Source of the calendar: Howard Hinnant, `civil_from_days`.
pub fn utc(seconds: u64) -> String {
    let (days, minute) = (seconds / 86_400 + 719_468, seconds / 60 % 1440);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // months from March
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

/// A time of the system, as [`utc`] writes it.
pub fn utc_of(time: SystemTime) -> String {
    utc(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_as_utc() {
        let times = [0, 951_782_399, 951_782_400, 1_795_765_560];
        let texts = ["1970-01-01 00:00 UTC", "2000-02-28 23:59 UTC", "2000-02-29 00:00 UTC", "2026-11-27 07:46 UTC"];
        assert_eq!(times.map(utc), texts);
    }
}
