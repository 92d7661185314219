//! `strftime_now`: the date in a prompt.
//!
//! The time is UTC. transformers uses the local zone, which the standard library cannot tell.

use std::fmt::Write;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
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

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    elapsed.ok().and_then(|elapsed| i64::try_from(elapsed.as_secs()).ok()).unwrap_or(0)
}

struct Date {
    year: i64,
    /// 1..=12
    month: usize,
    /// 1..=31
    day: i64,
    /// 0 is Sunday.
    weekday: usize,
    /// 1..=366
    day_of_year: i64,
    seconds: i64,
}

/// The proleptic Gregorian date, by counting years that begin in March (so that leap days come last).
fn date(unix_seconds: i64) -> Date {
    let days = unix_seconds.div_euclid(86_400);
    let shifted = days + 719_468; // days since 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * from_march + 2) / 153;
    let day = from_march - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
    let day_of_year = if month > 2 { from_march + 60 + leap } else { from_march - 305 };
    Date {
        year,
        month: usize::try_from(month).unwrap_or(1),
        day,
        weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
        day_of_year,
        seconds: unix_seconds.rem_euclid(86_400),
    }
}

/// C's `strftime` in the C locale; an unknown directive is an error that names it.
pub(super) fn strftime(format: &str, unix_seconds: i64) -> Result<String, String> {
    let date = date(unix_seconds.clamp(-62_135_596_800, 253_402_300_799));
    let (hour, minute, second) = (date.seconds / 3600, date.seconds / 60 % 60, date.seconds % 60);
    let half_day_hour = (hour + 11) % 12 + 1;
    let half = if hour < 12 { "AM" } else { "PM" };
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = characters.next();
        }
        let mut pad = |value: i64, width: usize| {
            let width = if unpadded { 0 } else { width };
            write!(out, "{value:0width$}")
        };
        _ = match directive {
            Some('Y') => pad(date.year, 4),
            Some('y') => pad(date.year.rem_euclid(100), 2),
            Some('m') => pad(i64::try_from(date.month).unwrap_or(1), 2),
            Some('d') => pad(date.day, 2),
            Some('H') => pad(hour, 2),
            Some('I') => pad(half_day_hour, 2),
            Some('M') => pad(minute, 2),
            Some('S') => pad(second, 2),
            Some('j') => pad(date.day_of_year, 3),
            Some('w') => pad(i64::try_from(date.weekday).unwrap_or(0), 1),
            Some('e') if unpadded => pad(date.day, 0),
            Some('e') => write!(out, "{:2}", date.day),
            Some('B') => out.write_str(MONTHS[date.month - 1]),
            Some('b' | 'h') => out.write_str(&MONTHS[date.month - 1][..3]),
            Some('A') => out.write_str(DAYS[date.weekday]),
            Some('a') => out.write_str(&DAYS[date.weekday][..3]),
            Some('p') => out.write_str(half),
            Some('F') => write!(out, "{:04}-{:02}-{:02}", date.year, date.month, date.day),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('R') => write!(out, "{hour:02}:{minute:02}"),
            Some('D') => {
                write!(out, "{:02}/{:02}/{:02}", date.month, date.day, date.year.rem_euclid(100))
            }
            Some('s') => write!(out, "{unix_seconds}"),
            Some('Z' | 'z') => Ok(()), // empty for Python's naive `datetime.now()`
            Some('%') => out.write_str("%"),
            Some('n') => out.write_str("\n"),
            Some('t') => out.write_str("\t"),
            Some(other) => return Err(format!("strftime_now: unknown directive %{other}")),
            None => return Err("strftime_now: the format ends with %".to_owned()),
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn known_dates() {
        let format = "%Y-%m-%d %H:%M:%S %a %A %b %B %j %I %p %-d %e %y";
        let expected = [
            (0, "1970-01-01 00:00:00 Thu Thursday Jan January 001 12 AM 1  1 70"),
            (951_782_400, "2000-02-29 00:00:00 Tue Tuesday Feb February 060 12 AM 29 29 00"),
            (1_735_689_599, "2024-12-31 23:59:59 Tue Tuesday Dec December 366 11 PM 31 31 24"),
            (1_772_323_200, "2026-03-01 00:00:00 Sun Sunday Mar March 060 12 AM 1  1 26"),
        ];
        for (seconds, text) in expected {
            assert_eq!(strftime(format, seconds).as_deref(), Ok(text));
        }
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("%", 0).is_err());
    }
}
