//! Errors of the HTTP API: `application/problem+json` with a stable code.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::{Error, Status};

/// An error answer. `code` is [`Status::as_str`] or one of the few that only HTTP knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    http: StatusCode,
    code: &'static str,
    detail: String,
}

pub(super) type Answer<T> = Result<T, Problem>;

/// RFC 9457.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'a str,
    status: u16,
    code: &'a str,
    detail: &'a str,
}

impl Problem {
    pub(super) fn new(status: Status, detail: impl Into<String>) -> Problem {
        Problem { http: http_status(status), code: status.as_str(), detail: detail.into() }
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Problem {
        Problem::new(Status::Invalid, detail)
    }

    pub(super) fn unknown_snapshot(name: &str) -> Problem {
        Problem::new(Status::UnknownSnapshot, format!("no snapshot {name:?} in the object store"))
    }

    /// Something that is neither a volume nor a snapshot and does not exist.
    pub(super) fn not_found(detail: impl Into<String>) -> Problem {
        Problem { http: StatusCode::NOT_FOUND, code: "not_found", detail: detail.into() }
    }

    /// The extractors' errors: too large, wrong content type, or invalid.
    pub(super) fn of_rejection(http: StatusCode, detail: String) -> Problem {
        let detail = detail.replace('\n', " ");
        match http {
            StatusCode::PAYLOAD_TOO_LARGE => Problem::new(Status::TooLarge, detail),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Problem { http, code: "unsupported_media_type", detail },
            _ => Problem::invalid(detail),
        }
    }

    /// What arrived is not what the client says it sent.
    pub(super) fn checksum(detail: impl Into<String>) -> Problem {
        Problem { http: StatusCode::BAD_REQUEST, code: "checksum_mismatch", detail: detail.into() }
    }

    /// The body of a request did not come in time.
    pub(super) fn body_late(limit: Duration) -> Problem {
        let detail = format!("the body of the request did not arrive within {} s", limit.as_secs());
        Problem { http: StatusCode::REQUEST_TIMEOUT, code: "request_timeout", detail }
    }

    pub(super) async fn unknown_route(uri: Uri) -> Problem {
        Problem::not_found(format!("no such resource: {}", uri.path()))
    }

    pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
        let detail = format!("{method} is not allowed on {}", uri.path());
        Problem { http: StatusCode::METHOD_NOT_ALLOWED, code: "method_not_allowed", detail }
    }

    pub(super) fn is(&self, status: Status) -> bool {
        self.code == status.as_str()
    }

    pub(super) fn detail(&self) -> &str {
        &self.detail
    }

    /// The same problem with more said about it.
    pub(super) fn and(mut self, more: &str) -> Problem {
        self.detail.push_str(more);
        self
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        Problem::new(error.status, error.message)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        // A long poll that ends unanswered is everyday business.
        if self.http.is_server_error() && self.code != Status::DeadlineExceeded.as_str() {
            tracing::warn!(code = self.code, detail = self.detail, "request failed");
        }
        let body = Body {
            kind: format!("urn:volley:problem:{}", self.code),
            title: self.http.canonical_reason().unwrap_or_default(),
            status: self.http.as_u16(),
            code: self.code,
            detail: &self.detail,
        };
        let mut response = (self.http, Json(body)).into_response();
        let problem_json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, problem_json);
        response
    }
}

fn http_status(status: Status) -> StatusCode {
    match status {
        Status::Ok => StatusCode::OK,
        Status::Invalid | Status::Unsupported | Status::OutOfRange | Status::Misaligned => StatusCode::BAD_REQUEST,
        Status::UnknownVolume | Status::UnknownSnapshot => StatusCode::NOT_FOUND,
        Status::NameTaken | Status::StaleGeneration | Status::NotAttached | Status::Conflict => StatusCode::CONFLICT,
        Status::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Status::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Status::ObjectStore | Status::Busy | Status::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
        Status::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Status::Corrupt | Status::Io | Status::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
