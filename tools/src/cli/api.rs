//! The server's HTTP API as the command line uses it: addresses, JSON, and errors that say what to do.

use std::io::{BufRead as _, BufReader};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body};
use volley_protocol::name::check_name;

use super::{CliError, CliResult};

const DEFAULT_PORT: u16 = 7480;
/// Creating 100,000 volumes is the longest request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// A description of 100,000 volumes is the largest answer.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// A server. Nothing is sent before the first request.
pub struct Api {
    base: String,
    agent: Agent,
}

impl Api {
    /// `server` is `host`, `host:port` or `http://host:port`; the port defaults to 7480.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn new(server: &str) -> CliResult<Api> {
        let base = base_url(server)?;
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(REQUEST_TIMEOUT));
        Ok(Api { base, agent: config.build().into() })
    }

    /// # Errors
    /// The server's problem, or that it can't be reached; so for all requests.
    pub fn get(&self, path: &str) -> CliResult<Value> {
        self.answer(self.agent.get(self.url(path)).call())
    }

    /// # Errors
    /// See [`Api::get`].
    pub fn post(&self, path: &str, body: &Value) -> CliResult<Value> {
        self.answer(self.agent.post(self.url(path)).send_json(body))
    }

    /// # Errors
    /// See [`Api::get`].
    pub fn put(&self, path: &str, body: &Value) -> CliResult<Value> {
        self.answer(self.agent.put(self.url(path)).send_json(body))
    }

    /// # Errors
    /// See [`Api::get`].
    pub fn patch(&self, path: &str, body: &Value) -> CliResult<Value> {
        self.answer(self.agent.patch(self.url(path)).send_json(body))
    }

    /// # Errors
    /// See [`Api::get`].
    pub fn delete(&self, path: &str) -> CliResult<Value> {
        self.answer(self.agent.delete(self.url(path)).call())
    }

    /// Server-sent events: `take` gets the kind and data of each, until it returns something or the server ends them.
    ///
    /// # Errors
    /// See [`Api::get`]; those of `take`.
    pub fn events<T>(
        &self,
        path: &str,
        mut take: impl FnMut(&str, &str) -> CliResult<Option<T>>,
    ) -> CliResult<Option<T>> {
        let sent = self.agent.get(self.url(path)).config().timeout_global(None).build().call();
        let sent = sent.map_err(|e| self.unreachable(&e))?;
        if !sent.status().is_success() {
            return self.answer(Ok(sent)).map(|_| None);
        }
        let (mut event, mut data) = (String::new(), String::new());
        for line in BufReader::new(sent.into_body().into_reader()).lines() {
            let line = line.map_err(|e| self.unreachable(&ureq::Error::Io(e)))?;
            match line.split_once(':') {
                Some(("event", kind)) => kind.trim_start().clone_into(&mut event),
                Some(("data", text)) => text.trim_start().clone_into(&mut data),
                None if line.is_empty() => {
                    if let Some(taken) = take(&event, &data)? {
                        return Ok(Some(taken));
                    }
                    event.clear();
                }
                _ => {}
            }
        }
        Ok(None)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn answer(&self, sent: Result<Response<Body>, ureq::Error>) -> CliResult<Value> {
        let mut response = sent.map_err(|e| self.unreachable(&e))?;
        let status = response.status();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        let body = body.map_err(|e| self.unreachable(&e))?;
        if status.is_success() && body.is_empty() {
            return Ok(Value::Null);
        }
        let value: Value = serde_json::from_str(&body).map_err(|_| self.not_volleyd(&status.to_string()))?;
        if status.is_success() {
            return Ok(value);
        }
        match (value["code"].as_str(), value["detail"].as_str()) {
            (Some(code), Some(detail)) => Err(CliError::new(code, detail)),
            _ => Err(self.not_volleyd(&status.to_string())),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> CliError {
        match error {
            ureq::Error::Protocol(_) | ureq::Error::Http(_) => self.not_volleyd(&error.to_string()),
            _ => CliError::new("unreachable", format!("cannot reach {}: {error}: is volleyd running?", self.base)),
        }
    }

    fn not_volleyd(&self, reason: &str) -> CliError {
        let message = format!("{} does not answer like volleyd ({reason}): is it the HTTP port?", self.base);
        CliError::new("unreachable", message)
    }
}

/// An answer as the fields a command shows.
///
/// # Errors
/// When the server's version is so different that fields are missing.
pub fn fields_of<T: DeserializeOwned>(value: &Value) -> CliResult<T> {
    T::deserialize(value).map_err(|e| CliError::new("unsupported", format!("unexpected answer of the server: {e}")))
}

/// The body of a request: what was given of its fields.
pub fn request_of(fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    let given = fields.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(given.map(|(key, value)| (key.to_string(), value)).collect())
}

/// A path segment made of a name, which may then not lead elsewhere.
///
/// # Errors
/// When it is no name.
pub fn segment(name: &str) -> CliResult<&str> {
    check_name(name).map_err(|e| CliError::new("invalid", e))?;
    Ok(name)
}

fn base_url(server: &str) -> CliResult<String> {
    let bad = |why: &str| {
        Err(CliError::new("invalid", format!("--server {server:?}: {why}: write host:port of the HTTP API")))
    };
    if server.starts_with("unix:") {
        return bad("a unix socket is a data port");
    }
    if server.starts_with("https:") {
        return bad("TLS is not spoken");
    }
    let address = server.strip_prefix("http://").unwrap_or(server).trim_end_matches('/');
    if address.is_empty() || address.contains(['/', '?', '#', '@', ' ']) {
        return bad("not an address");
    }
    let after_brackets = address.rsplit_once(']').map_or(address, |(_, rest)| rest);
    if after_brackets.contains(':') {
        return Ok(format!("http://{address}"));
    }
    Ok(format!("http://{address}:{DEFAULT_PORT}"))
}

#[cfg(test)]
mod tests {
    use super::base_url;

    #[test]
    fn addresses_get_the_default_port() {
        for (server, base) in [
            ("127.0.0.1:7480", "http://127.0.0.1:7480"),
            ("http://node7:80/", "http://node7:80"),
            ("node7", "http://node7:7480"),
            ("[::1]", "http://[::1]:7480"),
            ("[::1]:1", "http://[::1]:1"),
        ] {
            assert_eq!(base_url(server).as_deref(), Ok(base), "{server}");
        }
        for server in ["", "unix:/run/x", "https://a:1", "a b", "http://a/b"] {
            assert!(base_url(server).is_err(), "{server}");
        }
    }
}
