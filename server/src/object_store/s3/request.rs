//! One request to the bucket: signed, sent, judged by its status, and repeated within bounds where that may help.

use std::time::Duration;

use jiff::Timestamp;
use rusty_s3::signing;

use crate::object_store::ObjectError;
use crate::platform::Platform;

use super::S3Store;
use super::failure::{Asked, Failure, no_response, refused, wrong};
use super::transport::{Deadlines, HttpRequest, HttpResponse, HttpTransport, Method};

/// Answers without data of ours: errors, listings, results of uploads.
pub(super) const ANSWER_BYTES_MAX: u64 = 8 << 20;
/// A signature is good for this long: the longest request, and as much clock skew as stores allow anyway.
const SIGNATURE_SECONDS: u64 = 15 * 60;
/// A store that is slower than this for long is as good as gone; faster ones never meet the total deadline.
const BYTES_PER_SECOND_MIN: u64 = 256 << 10;
/// First pause between attempts; it doubles up to the last, with jitter.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What to ask of the bucket.
#[derive(Clone, Debug)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// With the prefix; `None`: the bucket itself.
    pub(super) key: Option<&'a str>,
    /// Such as `read`, for error lines.
    pub(super) verb: &'static str,
    pub(super) permission: &'static str,
    pub(super) query: Vec<(&'static str, String)>,
    /// Names in lower case. All are signed.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: &'a [u8],
    pub(super) response_bytes_max: u64,
}

impl<'a> Call<'a> {
    pub(super) fn new(method: Method, key: Option<&'a str>, verb: &'static str, permission: &'static str) -> Call<'a> {
        Call {
            method,
            key,
            verb,
            permission,
            query: Vec::new(),
            headers: Vec::new(),
            body: &[],
            response_bytes_max: ANSWER_BYTES_MAX,
        }
    }
}

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    /// One attempt, and one more if the credentials turned out to have expired.
    pub(super) async fn send(&self, call: &Call<'_>) -> Result<HttpResponse, Failure> {
        match self.send_once(call).await {
            Err(failure) if failure.is_expired() && self.inner.credentials.drop_expired() => self.send_once(call).await,
            result => result,
        }
    }

    /// Up to as many attempts as the store's policy allows, while the failure may pass.
    pub(super) async fn send_patiently(&self, call: &Call<'_>) -> Result<HttpResponse, Failure> {
        self.patiently(self.inner.policy.attempts, async || self.send(call).await).await
    }

    /// Repeats `attempt`, at most that often, while its failure may pass.
    pub(super) async fn patiently<R>(
        &self,
        attempts: u32,
        attempt: impl AsyncFn() -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let mut backoff = BACKOFF_MIN;
        for _ in 1..attempts {
            match attempt().await {
                Err(Failure { error: ObjectError::Retry(why) | ObjectError::SlowDown(why), .. }) => {
                    tracing::debug!(%why, "object store: trying again");
                    self.inner.platform.sleep(self.jittered(backoff)).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
                result => return result,
            }
        }
        attempt().await
    }

    /// Half to the whole of the back-off, so that clients do not retry in step.
    fn jittered(&self, backoff: Duration) -> Duration {
        backoff / 2 + backoff.mul_f64(self.inner.platform.random_u64() as f64 / u64::MAX as f64) / 2
    }

    async fn send_once(&self, call: &Call<'_>) -> Result<HttpResponse, Failure> {
        let credentials = self.inner.credentials.get(&self.inner.platform, &self.inner.transport).await;
        let credentials = credentials.map_err(|error| self.no_credentials(error))?;
        let source = credentials.as_ref().map(|keys| keys.source.as_str());
        let what = format!("{} {}", call.verb, call.key.unwrap_or("the bucket"));
        let asked = self.asked(call, &what, source);
        let url = self.signed_url(call, credentials.as_ref().map(|keys| &keys.credentials));
        let mut headers: Vec<_> =
            call.headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        headers.push(("user-agent".to_owned(), concat!("volley/", env!("CARGO_PKG_VERSION")).to_owned()));
        let request = HttpRequest {
            method: call.method,
            url: &url,
            headers,
            body: call.body,
            response_bytes_max: call.response_bytes_max,
            deadlines: self.deadlines(call.body.len() as u64 + call.response_bytes_max),
        };
        let response = self.inner.transport.send(request).await.map_err(|error| no_response(&asked, &error))?;
        match response.status {
            200..=299 => Ok(response),
            _ => Err(refused(&asked, &response)),
        }
    }

    /// The failure of a response that is not what the call asked for.
    pub(super) fn wrong(&self, call: &Call<'_>, status: u16, why: &str) -> Failure {
        let what = format!("{} {}", call.verb, call.key.unwrap_or("the bucket"));
        wrong(&self.asked(call, &what, None), status, why)
    }

    fn asked<'a>(&'a self, call: &'a Call<'_>, what: &'a str, credentials: Option<&'a str>) -> Asked<'a> {
        Asked {
            place: &self.inner.place,
            what,
            key: call.key.map_or("", |key| self.own_key(key)),
            credentials,
            permission: call.permission,
            now_s: self.now().as_second(),
        }
    }

    fn no_credentials(&self, error: ObjectError) -> Failure {
        let place = &self.inner.place;
        let error = match error {
            ObjectError::Retry(why) | ObjectError::SlowDown(why) => {
                ObjectError::Retry(format!("{place}: credentials: {why}"))
            }
            other => ObjectError::Fatal(format!("{place}: credentials: {other}")),
        };
        Failure { error, status: 0, code: String::new() }
    }

    pub(super) fn now(&self) -> Timestamp {
        let now_ms = i64::try_from(self.inner.platform.wall_clock_ms()).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(now_ms).unwrap_or(Timestamp::MAX)
    }

    fn deadlines(&self, bytes: u64) -> Deadlines {
        let settings = &self.inner.settings;
        let (connect, stall) = (settings.connect_timeout, settings.read_timeout);
        let transfer = Duration::from_secs(bytes.min(64 << 30) / BYTES_PER_SECOND_MIN);
        Deadlines { connect, stall, total: connect + stall + transfer }
    }

    fn signed_url(&self, call: &Call<'_>, credentials: Option<&rusty_s3::Credentials>) -> String {
        let bucket = &self.inner.bucket;
        let url = call.key.map_or_else(|| bucket.base_url().clone(), |key| bucket.object_url(key));
        let mut query: Vec<(&str, &str)> = call.query.iter().map(|(name, value)| (*name, value.as_str())).collect();
        query.sort_unstable();
        let Some(credentials) = credentials else { return with_query(url.as_str(), &query) };
        let mut headers: Vec<(&str, &str)> = call.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        headers.sort_unstable();
        let method = match call.method {
            Method::Get => rusty_s3::Method::Get,
            Method::Head => rusty_s3::Method::Head,
            Method::Put => rusty_s3::Method::Put,
            Method::Post => rusty_s3::Method::Post,
            Method::Delete => rusty_s3::Method::Delete,
        };
        let (key, secret, token) = (credentials.key(), credentials.secret(), credentials.token());
        let (query, headers) = (query.into_iter(), headers.into_iter());
        let now = self.now();
        signing::sign(&now, method, url, key, secret, token, bucket.region(), SIGNATURE_SECONDS, query, headers).into()
    }
}

/// An unsigned URL.
fn with_query(url: &str, query: &[(&str, &str)]) -> String {
    let mut url = url.to_owned();
    for (i, (name, value)) in query.iter().enumerate() {
        url.push(if i == 0 { '?' } else { '&' });
        url.push_str(&encoded(name));
        url.push('=');
        url.push_str(&encoded(value));
    }
    url
}

/// Percent-encoded for use in a query.
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}
