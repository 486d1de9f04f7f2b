//! Fetches keys: profile files, web identity (STS), the container's endpoint, the instance's metadata (IMDSv2).

use std::path::Path;
use std::time::Duration;

use rusty_s3::Credentials;
use serde::Deserialize;

use crate::object_store::ObjectError;
use crate::platform::{Platform, Time};

use super::credentials::{FILE_KEYS_LIFE, Keys, Source, unreadable};
use super::profile::Profile;
use super::request::encoded;
use super::settings::ProfileFiles;
use super::transport::{Deadlines, HttpErrorKind, HttpRequest, HttpResponse, HttpTransport, Method};
use super::xml;

/// Metadata answers from the same machine; the token service from nearby.
const DEADLINES: Deadlines =
    Deadlines { connect: Duration::from_secs(2), stall: Duration::from_secs(5), total: Duration::from_secs(10) };
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Tokens of the metadata service live as long as one fetch needs them.
const IMDS_TOKEN_SECONDS: &str = "60";
const IMDS_ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// Keys as container and instance endpoints hand them out.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    access_key_id: String,
    secret_access_key: String,
    token: Option<String>,
    expiration: Option<String>,
}

pub(super) async fn fetch<P: Platform, T: HttpTransport>(
    source: &Source,
    platform: &P,
    transport: &T,
) -> Result<Keys, ObjectError> {
    let clock = Clock::of(platform);
    let (credentials, expires) = match source {
        Source::Anonymous => return Err(ObjectError::Fatal("anonymous requests have no keys".to_owned())),
        Source::Environment { key, secret, token } => (made(key, secret, token.as_deref()), None),
        Source::Profile { name, files } => {
            (from_profile(transport, name, files).await?, Some(clock.now.after(FILE_KEYS_LIFE)))
        }
        Source::WebIdentity { token_file, role_arn, session, sts } => {
            let token = text_of(transport, "web identity token", token_file).await?;
            from_sts(transport, sts, role_arn, session, &token, &clock).await?
        }
        Source::Container { url, token, token_file } => {
            let token = match token_file {
                Some(file) => Some(text_of(transport, "authorization token", file).await?),
                None => token.clone(),
            };
            let headers = token.map(|token| vec![("authorization".to_owned(), token)]).unwrap_or_default();
            from_document(&ask(transport, Method::Get, url, headers).await?, &clock)?
        }
        Source::Instance { endpoint } => from_instance(transport, endpoint, &clock).await?,
    };
    Ok(Keys { credentials, source: source.to_string(), expires })
}

/// Translates times of the calendar into those of the platform.
struct Clock {
    now: Time,
    wall_ms: i64,
}

impl Clock {
    fn of<P: Platform>(platform: &P) -> Clock {
        Clock { now: platform.now(), wall_ms: i64::try_from(platform.wall_clock_ms()).unwrap_or(i64::MAX) }
    }

    /// `None` for what is no time: then the keys are good until the store says otherwise.
    fn at(&self, text: &str) -> Option<Time> {
        let at: jiff::Timestamp = text.parse().ok()?;
        let left_ms = at.as_millisecond().saturating_sub(self.wall_ms);
        Some(self.now.after(Duration::from_millis(u64::try_from(left_ms).unwrap_or(0))))
    }
}

fn made(key: &str, secret: &str, token: Option<&str>) -> Credentials {
    match token {
        Some(token) => Credentials::new_with_token(key, secret, token),
        None => Credentials::new(key, secret),
    }
}

async fn from_profile<T: HttpTransport>(
    transport: &T,
    name: &str,
    files: &ProfileFiles,
) -> Result<Credentials, ObjectError> {
    let mut texts = Vec::new();
    for path in [&files.config, &files.credentials].into_iter().flatten() {
        match transport.read_file(path).await {
            Ok(bytes) => texts.push(String::from_utf8_lossy(&bytes).into_owned()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(unreadable("profile file", path, &e)),
        }
    }
    let profile = Profile::find(name, &texts).unwrap_or_default();
    match (profile.get("aws_access_key_id"), profile.get("aws_secret_access_key")) {
        (Some(key), Some(secret)) => Ok(made(key, secret, profile.get("aws_session_token"))),
        _ => Err(ObjectError::Fatal(format!(
            "profile {name:?} lacks aws_access_key_id or aws_secret_access_key: write both to ~/.aws/credentials"
        ))),
    }
}

async fn from_sts<T: HttpTransport>(
    transport: &T,
    sts: &str,
    role_arn: &str,
    session: &str,
    token: &str,
    clock: &Clock,
) -> Result<(Credentials, Option<Time>), ObjectError> {
    let url = format!("{}/", sts.trim_end_matches('/'));
    let form = format!(
        "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn={}&RoleSessionName={}&WebIdentityToken={}",
        encoded(role_arn),
        encoded(session),
        encoded(token)
    );
    let headers = vec![("content-type".to_owned(), "application/x-www-form-urlencoded".to_owned())];
    let response = exchange(transport, Method::Post, &url, headers, form.as_bytes()).await?;
    let body = String::from_utf8_lossy(&response.body);
    let part = |tag: &str| xml::text(&body, tag);
    match (part("AccessKeyId"), part("SecretAccessKey"), part("SessionToken")) {
        (Some(key), Some(secret), token) => {
            let expires = part("Expiration").and_then(|text| clock.at(&text));
            Ok((made(&key, &secret, token.as_deref()), expires))
        }
        _ => Err(ObjectError::Fatal(format!("{url} answered without keys"))),
    }
}

async fn from_instance<T: HttpTransport>(
    transport: &T,
    endpoint: &str,
    clock: &Clock,
) -> Result<(Credentials, Option<Time>), ObjectError> {
    let endpoint = endpoint.trim_end_matches('/');
    let ttl = vec![("x-aws-ec2-metadata-token-ttl-seconds".to_owned(), IMDS_TOKEN_SECONDS.to_owned())];
    let token = ask(transport, Method::Put, &format!("{endpoint}/latest/api/token"), ttl).await;
    let token = token.map_err(|error| match error {
        // No metadata service is the usual way to have no credentials at all, and does not pass.
        ObjectError::Retry(why) => ObjectError::Fatal(format!(
            "none found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, write a profile to ~/.aws/credentials, or \
             set anonymous in [s3] (last tried: the instance's metadata: {why})"
        )),
        other => other,
    })?;
    let headers = || vec![("x-aws-ec2-metadata-token".to_owned(), token.trim().to_owned())];
    let roles = format!("{endpoint}{IMDS_ROLES}");
    let role = ask(transport, Method::Get, &roles, headers()).await?;
    let role = role.lines().next().unwrap_or_default().trim().to_owned();
    from_document(&ask(transport, Method::Get, &format!("{roles}{role}"), headers()).await?, clock)
}

fn from_document(json: &str, clock: &Clock) -> Result<(Credentials, Option<Time>), ObjectError> {
    let document: Document = serde_json::from_str(json)
        .map_err(|e| ObjectError::Fatal(format!("the answer of the credentials endpoint has no keys: {e}")))?;
    let Document { access_key_id, secret_access_key, token, expiration } = document;
    let expires = expiration.and_then(|text| clock.at(&text));
    Ok((made(&access_key_id, &secret_access_key, token.as_deref()), expires))
}

async fn ask<T: HttpTransport>(
    transport: &T,
    method: Method,
    url: &str,
    headers: Vec<(String, String)>,
) -> Result<String, ObjectError> {
    let response = exchange(transport, method, url, headers, &[]).await?;
    Ok(String::from_utf8_lossy(&response.body).into_owned())
}

async fn exchange<T: HttpTransport>(
    transport: &T,
    method: Method,
    url: &str,
    headers: Vec<(String, String)>,
    body: &[u8],
) -> Result<HttpResponse, ObjectError> {
    let request =
        HttpRequest { method, url, headers, body, response_bytes_max: ANSWER_BYTES_MAX, deadlines: DEADLINES };
    let response = transport.send(request).await.map_err(|error| match error.kind {
        HttpErrorKind::Tls | HttpErrorKind::TooLong => ObjectError::Fatal(format!("{url}: {error}")),
        _ => ObjectError::Retry(format!("{url}: {error}")),
    })?;
    match response.status {
        200..=299 => Ok(response),
        429 | 500..=599 => Err(ObjectError::Retry(format!("{url}: {}", response.status))),
        status => {
            let body = String::from_utf8_lossy(&response.body);
            let said = xml::text(&body, "Message").unwrap_or_default();
            Err(ObjectError::Fatal(format!("{url}: {status} {said}").trim_end().to_owned()))
        }
    }
}

async fn text_of<T: HttpTransport>(transport: &T, what: &str, path: &Path) -> Result<String, ObjectError> {
    let bytes = transport.read_file(path).await.map_err(|e| unreadable(what, path, &e))?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
