//! What a failed request means: one of the classes of [`ObjectError`], and one line that says where, why and what to do.

use crate::object_store::ObjectError;

use super::transport::{HttpError, HttpErrorKind, HttpResponse};
use super::xml;

/// AWS refuses signatures that are this far from its own clock.
const SKEW_SECONDS_MAX: i64 = 15 * 60;
/// Error texts of stores are quoted up to here.
const MESSAGE_CHARS_MAX: usize = 200;

/// A failed request, with what its caller may want to know besides the class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) error: ObjectError,
    /// 0: there was no response.
    pub(super) status: u16,
    /// The store's own name of the error; empty without one.
    pub(super) code: String,
}

impl Failure {
    /// The store does not know what was asked for: it may be asked in another way.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.status == 501 || self.code == "NotImplemented"
    }

    /// Newer credentials may help.
    pub(super) fn is_expired(&self) -> bool {
        matches!(self.code.as_str(), "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken")
    }

    /// The request may have been carried out all the same.
    pub(super) fn is_ambiguous(&self) -> bool {
        self.status == 0 || self.status >= 500
    }
}

impl From<Failure> for ObjectError {
    fn from(failure: Failure) -> ObjectError {
        failure.error
    }
}

/// Who asked for what: the first half of every error line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// `s3://bucket/prefix at https://endpoint`.
    pub(super) place: &'a str,
    /// Such as `read packs/x`.
    pub(super) what: &'a str,
    pub(super) key: &'a str,
    /// Where the credentials came from; `None`: the request was not signed.
    pub(super) credentials: Option<&'a str>,
    /// Permission the request needs.
    pub(super) permission: &'a str,
    /// This machine's clock.
    pub(super) now_s: i64,
}

/// No response came.
pub(super) fn no_response(asked: &Asked<'_>, error: &HttpError) -> Failure {
    let Asked { place, what, .. } = asked;
    let text = |advice: &str| format!("{place}: {what}: {error}{advice}");
    let error = match error.kind {
        HttpErrorKind::Unreachable => ObjectError::Retry(text(": check the endpoint and the network")),
        HttpErrorKind::Tls => ObjectError::Fatal(text(
            ": give the authority's certificate as ca_file or AWS_CA_BUNDLE, or correct the endpoint",
        )),
        HttpErrorKind::Timeout => ObjectError::SlowDown(text("")),
        HttpErrorKind::Broken => ObjectError::Retry(text("")),
        HttpErrorKind::TooLong => ObjectError::Corrupt(text("")),
    };
    Failure { error, status: 0, code: String::new() }
}

/// A response came and says no.
pub(super) fn refused(asked: &Asked<'_>, response: &HttpResponse) -> Failure {
    let status = response.status;
    let body = String::from_utf8_lossy(&response.body);
    let code = xml::text(&body, "Code").unwrap_or_default();
    let message: String = xml::text(&body, "Message").unwrap_or_default().chars().take(MESSAGE_CHARS_MAX).collect();
    let said = match (code.as_str(), message.as_str()) {
        ("", _) => status.to_string(),
        (code, "") => format!("{status} {code}"),
        (code, message) => format!("{status} {code} ({})", message.trim_end_matches('.')),
    };
    let line = |advice: &str| format!("{}: {}: {said}{advice}", asked.place, asked.what);
    let error = match (status, code.as_str()) {
        (404, "NoSuchBucket") => {
            ObjectError::Fatal(line(": the bucket does not exist: create it, or correct the URL or the endpoint"))
        }
        (404, "NoSuchUpload") => ObjectError::Retry(line("")),
        (404, _) => ObjectError::NotFound(asked.key.to_owned()),
        (412, _) => ObjectError::AlreadyExists(asked.key.to_owned()),
        (416, _) => ObjectError::Corrupt(line(": the object is shorter than it should be")),
        (301 | 302 | 307 | 308, _) | (_, "AuthorizationHeaderMalformed" | "PermanentRedirect") => {
            ObjectError::Fatal(line(&elsewhere(response, &body)))
        }
        (429 | 503, _) | (_, "SlowDown" | "SlowDownRead" | "SlowDownWrite" | "Throttling" | "RequestLimitExceeded") => {
            ObjectError::SlowDown(line(""))
        }
        (408 | 409 | 425 | 500 | 502..=599, _) => ObjectError::Retry(line("")),
        (400, "RequestTimeout" | "IncompleteBody" | "BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch") => {
            ObjectError::Retry(line(""))
        }
        _ => ObjectError::Fatal(line(&denied(asked, response, status, &code))),
    };
    Failure { error, status, code }
}

/// A response came and is not what was asked for.
pub(super) fn wrong(asked: &Asked<'_>, status: u16, why: &str) -> Failure {
    let text = format!("{}: {}: {why}", asked.place, asked.what);
    Failure { error: ObjectError::Corrupt(text), status, code: String::new() }
}

fn elsewhere(response: &HttpResponse, body: &str) -> String {
    let region = response.header("x-amz-bucket-region").map(str::to_owned).or_else(|| xml::text(body, "Region"));
    let endpoint = xml::text(body, "Endpoint");
    match (region, endpoint) {
        (Some(region), _) => format!(": the bucket is in region {region}: set region (AWS_REGION) to it"),
        (None, Some(endpoint)) => format!(": the bucket is served by {endpoint}: set endpoint (AWS_ENDPOINT_URL)"),
        (None, None) => ": the bucket is served elsewhere: correct region and endpoint".to_owned(),
    }
}

/// Advice for what the store refuses for good.
fn denied(asked: &Asked<'_>, response: &HttpResponse, status: u16, code: &str) -> String {
    let source = asked.credentials.unwrap_or("nowhere (anonymous)");
    let skew = asked.credentials.and_then(|_| skew_seconds(response, asked.now_s)).unwrap_or(0);
    match code {
        _ if code == "RequestTimeTooSkewed" || (status == 403 && skew.abs() > SKEW_SECONDS_MAX) => {
            let (by, side) = (skew.unsigned_abs(), if skew < 0 { "behind" } else { "ahead of" });
            format!(": this machine's clock is {by} s {side} the store's: set it (NTP)")
        }
        "ExpiredToken" | "TokenRefreshRequired" | "InvalidToken" => {
            format!(": the session token from {source} has expired or is invalid: renew it")
        }
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "NotSignedUp" => {
            format!(": the credentials from {source} are wrong: correct them")
        }
        _ if status == 401 || status == 403 => match asked.credentials {
            Some(_) => format!(": the credentials from {source} lack {} here: grant it", asked.permission),
            None => format!(": anonymous requests lack {} here: give credentials", asked.permission),
        },
        _ => String::new(),
    }
}

/// How far this clock is ahead of the store's, by the response's `Date`.
pub(super) fn skew_seconds(response: &HttpResponse, now_s: i64) -> Option<i64> {
    let date = response.header("date")?;
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp().as_second();
    Some(now_s - theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked<'static> = Asked {
        place: "s3://b/p at http://h",
        what: "read packs/x",
        key: "packs/x",
        credentials: Some("the environment"),
        permission: "s3:GetObject",
        now_s: 1_700_003_600,
    };

    fn refusal(status: u16, code: &str) -> ObjectError {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m &amp; n.</Message></Error>");
        refused(&ASKED, &HttpResponse { status, body: body.into_bytes(), ..HttpResponse::default() }).error
    }

    #[test]
    fn statuses_and_codes_have_their_class() {
        let class = |error: &ObjectError| match error {
            ObjectError::NotFound(_) => "not found",
            ObjectError::AlreadyExists(_) => "exists",
            ObjectError::Corrupt(_) => "corrupt",
            ObjectError::Retry(_) => "retry",
            ObjectError::SlowDown(_) => "slow down",
            ObjectError::Fatal(_) => "fatal",
        };
        for (status, code, expected) in [
            (404, "NoSuchKey", "not found"),
            (404, "", "not found"),
            (404, "NoSuchBucket", "fatal"),
            (404, "NoSuchUpload", "retry"),
            (409, "ConditionalRequestConflict", "retry"),
            (412, "PreconditionFailed", "exists"),
            (416, "InvalidRange", "corrupt"),
            (429, "", "slow down"),
            (500, "InternalError", "retry"),
            (501, "NotImplemented", "fatal"),
            (503, "SlowDown", "slow down"),
            (400, "SlowDown", "slow down"),
            (400, "BadDigest", "retry"),
            (400, "InvalidArgument", "fatal"),
            (403, "AccessDenied", "fatal"),
            (301, "PermanentRedirect", "fatal"),
            (400, "ExpiredToken", "fatal"),
        ] {
            assert_eq!(class(&refusal(status, code)), expected, "{status} {code}");
        }
    }

    #[test]
    fn lines_name_the_place_the_cause_and_what_to_do() {
        for (status, code, words) in [
            (404, "NoSuchBucket", ["s3://b/p at http://h", "does not exist: create it"]),
            (403, "AccessDenied", ["(m & n)", "from the environment lack s3:GetObject"]),
            (403, "SignatureDoesNotMatch", ["read packs/x", "are wrong"]),
            (400, "ExpiredToken", ["the environment", "expired"]),
        ] {
            let line = refusal(status, code).to_string();
            assert!(words.iter().all(|word| line.contains(word)) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_clock_that_is_off_is_named_whatever_the_store_calls_it() {
        let date = ("date".to_owned(), "Tue, 14 Nov 2023 22:13:20 GMT".to_owned());
        for code in ["AccessDenied", "RequestTimeTooSkewed"] {
            let body = format!("<Error><Code>{code}</Code></Error>").into_bytes();
            let response = HttpResponse { status: 403, headers: vec![date.clone()], body };
            let line = refused(&ASKED, &response).error.to_string();
            assert!(line.contains("clock is 3600 s ahead of"), "{line}");
        }
    }

    #[test]
    fn the_bucket_s_region_is_passed_on() {
        let headers = vec![("x-amz-bucket-region".to_owned(), "eu-west-1".to_owned())];
        let line = refused(&ASKED, &HttpResponse { status: 301, headers, body: Vec::new() }).error.to_string();
        assert!(line.contains("region eu-west-1"), "{line}");
    }
}
