//! The store over a scripted transport: what goes out, and what is made of what comes back.

mod keys;
mod puts;
mod reads;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::transport::{HttpError, HttpRequest, HttpResponse, HttpTransport};
use super::*;
use crate::object_store::ObjectStoreUrl;
use crate::platform::blocking::Blocking;

type Answer = Result<HttpResponse, HttpError>;

/// A request as it went out, without its signature.
#[derive(Clone, Debug)]
struct Sent {
    method: Method,
    /// Path and the part of the query that is ours.
    target: String,
    url: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Sent {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    fn line(&self) -> String {
        format!("{} {}", self.method.as_str(), self.target)
    }
}

/// What a test answers, given how many requests came before.
type Script = dyn Fn(usize, &Sent) -> Answer;

/// Answers requests by a function of the test, and keeps them.
#[derive(Clone)]
struct Fake {
    answer: Rc<Script>,
    sent: Rc<RefCell<Vec<Sent>>>,
    files: BTreeMap<PathBuf, String>,
}

impl Fake {
    fn new(answer: impl Fn(usize, &Sent) -> Answer + 'static) -> Fake {
        Fake { answer: Rc::new(answer), sent: Rc::default(), files: BTreeMap::new() }
    }

    fn sent(&self) -> Vec<Sent> {
        self.sent.borrow().clone()
    }

    fn lines(&self) -> Vec<String> {
        self.sent().iter().map(Sent::line).collect()
    }
}

impl HttpTransport for Fake {
    async fn send(&self, request: HttpRequest<'_>) -> Answer {
        let (path, query) = request.url.split_once('?').unwrap_or((request.url, ""));
        let ours: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("X-Amz-")).collect();
        let separator = if ours.is_empty() { "" } else { "?" };
        let sent = Sent {
            method: request.method,
            target: format!("{path}{separator}{}", ours.join("&")),
            url: request.url.to_owned(),
            headers: request.headers.clone(),
            body: request.body.to_vec(),
        };
        let number = {
            let mut all = self.sent.borrow_mut();
            all.push(sent.clone());
            all.len() - 1
        };
        (self.answer)(number, &sent)
    }

    async fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        let text = self.files.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(text.clone().into_bytes())
    }
}

fn ok(body: &str) -> Answer {
    answer(200, &[], body)
}

fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Answer {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Ok(HttpResponse { status, headers, body: body.as_bytes().to_vec() })
}

fn refusal(status: u16, code: &str) -> Answer {
    answer(status, &[], &format!("<Error><Code>{code}</Code><Message>no</Message></Error>"))
}

fn env(variables: &[(&str, &str)]) -> Environment {
    Environment::of(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
}

fn location(url: &str) -> S3Location {
    match url.parse() {
        Ok(ObjectStoreUrl::S3(location)) => location,
        other => panic!("{other:?}"),
    }
}

const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AK"), ("AWS_SECRET_ACCESS_KEY", "SK")];

fn settings(config: &S3Config) -> S3Settings {
    S3Settings::resolve(&location("s3://bucket/pre/fix"), config, &env(&KEYS)).unwrap()
}

fn config() -> S3Config {
    S3Config { endpoint: Some("http://store:9000".to_owned()), ..S3Config::default() }
}

const POLICY: RequestPolicy = RequestPolicy { range_attempts: 1, attempts: 3 };

fn store(fake: &Fake) -> S3Store<Blocking, Fake> {
    store_with(fake, &config())
}

fn store_with(fake: &Fake, config: &S3Config) -> S3Store<Blocking, Fake> {
    S3Store::new(Blocking, fake.clone(), settings(config), POLICY).unwrap()
}
