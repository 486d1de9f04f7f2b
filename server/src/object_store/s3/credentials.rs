//! Credentials: where they come from, and keys that are renewed before they expire.
//!
//! The order is that of AWS's own tools: environment, web identity, profile files, container, instance. Which of them applies
//! is decided once at the start; the keys of all but the environment are fetched again when their time is nearly over.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use rusty_s3::Credentials;

use crate::object_store::ObjectError;
use crate::platform::{Platform, Time};

use super::profile::Profile;
use super::settings::{Environment, ProfileFiles};
use super::sources;
use super::transport::HttpTransport;

/// Keys are renewed this long before they expire: longer than any request takes.
const RENEW_BEFORE: Duration = Duration::from_secs(5 * 60);
/// Between attempts to renew keys that are still good.
const RENEW_RETRY: Duration = Duration::from_secs(30);
/// Keys in files carry no time of expiry, but other tools renew them there.
pub(super) const FILE_KEYS_LIFE: Duration = Duration::from_secs(15 * 60);

/// Where keys come from.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Source {
    Anonymous,
    Environment {
        key: String,
        secret: String,
        token: Option<String>,
    },
    Profile {
        name: String,
        files: ProfileFiles,
    },
    WebIdentity {
        token_file: PathBuf,
        role_arn: String,
        session: String,
        sts: String,
    },
    /// A URL of the container's host, with the token it wants.
    Container {
        url: String,
        token: Option<String>,
        token_file: Option<PathBuf>,
    },
    /// The metadata service of the machine.
    Instance {
        endpoint: String,
    },
}

impl Source {
    /// The first source that applies.
    ///
    /// # Errors
    /// Where a source is given by halves, or needs what is not supported.
    pub(super) fn choose(
        env: &Environment,
        profile: &Profile,
        files: ProfileFiles,
        region: &str,
    ) -> Result<Source, String> {
        let owned = |name: &str| env.get(name).map(str::to_owned);
        match (owned("AWS_ACCESS_KEY_ID"), owned("AWS_SECRET_ACCESS_KEY")) {
            (Some(key), Some(secret)) => {
                return Ok(Source::Environment { key, secret, token: owned("AWS_SESSION_TOKEN") });
            }
            (None, None) => {}
            _ => return Err("only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set: set both".to_owned()),
        }
        let sts = owned("AWS_ENDPOINT_URL_STS").unwrap_or_else(|| format!("https://sts.{region}.amazonaws.com"));
        let web_identity = |token_file: &str, role_arn: &str, session: Option<&str>| Source::WebIdentity {
            token_file: PathBuf::from(token_file),
            role_arn: role_arn.to_owned(),
            session: session.unwrap_or("volley").to_owned(),
            sts: sts.clone(),
        };
        if let (Some(file), Some(role)) = (env.get("AWS_WEB_IDENTITY_TOKEN_FILE"), env.get("AWS_ROLE_ARN")) {
            return Ok(web_identity(file, role, env.get("AWS_ROLE_SESSION_NAME")));
        }
        if profile.get("aws_access_key_id").is_some() {
            return Ok(Source::Profile { name: profile.name.clone(), files });
        }
        if let (Some(file), Some(role)) = (profile.get("web_identity_token_file"), profile.get("role_arn")) {
            return Ok(web_identity(file, role, profile.get("role_session_name")));
        }
        for unsupported in ["credential_process", "sso_session", "sso_start_url", "source_profile", "credential_source"]
        {
            if profile.get(unsupported).is_some() {
                return Err(format!(
                    "profile {:?} uses {unsupported}, which is not supported: let it write keys to the shared \
                     credentials file, or set them in the environment",
                    profile.name
                ));
            }
        }
        let container = owned("AWS_CONTAINER_CREDENTIALS_FULL_URI").or_else(|| {
            let path = env.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")?;
            Some(format!("http://169.254.170.2{path}"))
        });
        if let Some(url) = container {
            let token_file = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").map(PathBuf::from);
            return Ok(Source::Container { url, token: owned("AWS_CONTAINER_AUTHORIZATION_TOKEN"), token_file });
        }
        if env.get("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Err("no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, write a profile to \
                        ~/.aws/credentials, or set anonymous in [s3]"
                .to_owned());
        }
        let endpoint = owned("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        Ok(Source::Instance { endpoint: endpoint.unwrap_or_else(|| "http://169.254.169.254".to_owned()) })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Anonymous => f.write_str("nowhere (anonymous)"),
            Source::Environment { .. } => f.write_str("the environment"),
            Source::Profile { name, .. } => write!(f, "profile {name:?}"),
            Source::WebIdentity { role_arn, .. } => write!(f, "the web identity of {role_arn}"),
            Source::Container { .. } => f.write_str("the container's endpoint"),
            Source::Instance { .. } => f.write_str("the instance's metadata"),
        }
    }
}

/// Says where keys come from, never what they are.
impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Keys and how long they are good.
#[derive(Debug)]
pub(super) struct Keys {
    pub(super) credentials: Credentials,
    /// For error lines.
    pub(super) source: String,
    pub(super) expires: Option<Time>,
}

/// The present keys of a store.
pub(super) struct Provider {
    source: Source,
    // A mutex because tools use one store from many threads; on a shard nobody contends for it. Never held over an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    keys: Option<Arc<Keys>>,
    /// Nobody else tries to renew good keys before this.
    renew_after: Time,
}

impl Provider {
    pub(super) fn new(source: Source) -> Provider {
        Provider { source, state: Mutex::default() }
    }

    /// Keys that are good now; `None` for anonymous requests.
    ///
    /// # Errors
    /// `Retry` or `Fatal`, with the source in the text.
    pub(super) async fn get<P: Platform, T: HttpTransport>(
        &self,
        platform: &P,
        transport: &T,
    ) -> Result<Option<Arc<Keys>>, ObjectError> {
        if self.source == Source::Anonymous {
            return Ok(None);
        }
        let now = platform.now();
        let old = {
            let mut state = self.lock();
            match &state.keys {
                Some(keys) if keys.expires.is_none_or(|at| now.after(RENEW_BEFORE) < at) || now < state.renew_after => {
                    return Ok(Some(keys.clone()));
                }
                // One request renews them; all others go on with those that are still good.
                Some(keys) => {
                    let keys = keys.clone();
                    state.renew_after = now.after(RENEW_RETRY);
                    Some(keys)
                }
                None => None,
            }
        };
        match sources::fetch(&self.source, platform, transport).await {
            Ok(fresh) => {
                let fresh = Arc::new(fresh);
                *self.lock() = State { keys: Some(fresh.clone()), renew_after: Time::default() };
                Ok(Some(fresh))
            }
            Err(error) => match old {
                Some(old) if old.expires.is_some_and(|at| now < at) => {
                    tracing::warn!(%error, "credentials not renewed: trying again, they are still good");
                    Ok(Some(old))
                }
                _ => Err(error),
            },
        }
    }

    /// Forgets keys that the store calls expired; `false` if there are no others to be had.
    pub(super) fn drop_expired(&self) -> bool {
        self.lock().keys = None;
        !matches!(self.source, Source::Anonymous | Source::Environment { .. })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a file that should hold something for us.
pub(super) fn unreadable(what: &str, path: &std::path::Path, error: &io::Error) -> ObjectError {
    ObjectError::Fatal(format!("{what} {}: {error}", path.display()))
}
