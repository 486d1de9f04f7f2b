//! Puts: whole, or only where there is no object yet.
//!
//! Every put carries its MD5, so a store never keeps what was damaged on the way. A conditional put also carries a random mark
//! as metadata: when its answer was lost and the next attempt finds an object, the mark tells whether it is ours.

use std::sync::atomic::Ordering;

use md5::{Digest as _, Md5};

use crate::object_store::ObjectError;
use crate::platform::Platform;

use super::S3Store;
use super::failure::Failure;
use super::request::Call;
use super::settings::ConditionalPut;
use super::transport::{HttpTransport, Method};

/// Larger objects go up in parts: a lost connection then costs a part, and stores refuse single puts above 5 GiB.
const SINGLE_PUT_BYTES_MAX: usize = 16 << 20;
/// Hashed at once: a fifth of a millisecond.
const HASH_SLICE_BYTES: usize = 128 << 10;
/// The store is asked for the same put once more if the object is no larger than this: to learn whether it refuses.
const TRIAL_BYTES_MAX: usize = 64 << 10;
/// Metadata that holds the mark.
const MARK: &str = "x-amz-meta-volley-put";
pub(super) const PUT: &str = "s3:PutObject";

/// What is known of the store's conditional puts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conditional {
    Unknown = 0,
    Honoured = 1,
    /// Not there, ignored, or switched off: look first.
    Absent = 2,
}

impl Conditional {
    pub(super) fn at_start(setting: ConditionalPut) -> Conditional {
        match setting {
            ConditionalPut::Auto => Conditional::Unknown,
            ConditionalPut::Off => Conditional::Absent,
        }
    }
}

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    pub(super) async fn put_object(&self, key: &str, data: &[u8]) -> Result<(), Failure> {
        self.upload(key, data, None, false).await
    }

    pub(super) async fn put_new(&self, key: &str, data: &[u8]) -> Result<(), Failure> {
        let platform = &self.inner.platform;
        let mark = format!("{:016x}{:016x}", platform.random_u64(), platform.random_u64());
        match self.conditional() {
            Conditional::Honoured => self.put_conditionally(key, data, &mark).await,
            Conditional::Absent => self.put_after_a_look(key, data, &mark).await,
            Conditional::Unknown => {
                self.refuse_present(key).await?;
                match self.put_conditionally(key, data, &mark).await {
                    Err(failure) if failure.is_not_implemented() => {
                        self.weaker("lacks conditional puts");
                        self.put_after_a_look(key, data, &mark).await
                    }
                    Ok(()) if data.len() <= TRIAL_BYTES_MAX => self.learn(key, data, &mark).await,
                    result => result,
                }
            }
        }
    }

    /// Puts the same object again: a store that honours the condition refuses, one that ignores it changes nothing.
    async fn learn(&self, key: &str, data: &[u8], mark: &str) -> Result<(), Failure> {
        match self.upload(key, data, Some(mark), true).await {
            Err(Failure { error: ObjectError::AlreadyExists(_), .. }) => self.set_conditional(Conditional::Honoured),
            Ok(()) => self.weaker("ignores the condition of conditional puts"),
            // Nothing is learnt; the object is there all the same.
            Err(failure) => tracing::debug!(error = %failure.error, "conditional put not tried"),
        }
        Ok(())
    }

    async fn put_conditionally(&self, key: &str, data: &[u8], mark: &str) -> Result<(), Failure> {
        let unanswered = std::cell::Cell::new(false);
        let attempt = async || {
            let result = self.upload(key, data, Some(mark), true).await;
            match &result {
                // An earlier attempt may have done it.
                Err(Failure { error: ObjectError::AlreadyExists(_), .. }) if unanswered.get() => {
                    if self.has_mark(key, mark).await? { Ok(()) } else { result }
                }
                Err(failure) => {
                    unanswered.set(unanswered.get() || failure.is_ambiguous());
                    result
                }
                Ok(()) => result,
            }
        };
        self.patiently(self.inner.policy.attempts, attempt).await
    }

    async fn put_after_a_look(&self, key: &str, data: &[u8], mark: &str) -> Result<(), Failure> {
        self.refuse_present(key).await?;
        self.upload(key, data, Some(mark), false).await
    }

    async fn refuse_present(&self, key: &str) -> Result<(), Failure> {
        let look = Call::new(Method::Head, Some(key), "look for", "s3:GetObject");
        match self.send_patiently(&look).await {
            Ok(response) => {
                let error = ObjectError::AlreadyExists(self.own_key(key).to_owned());
                Err(Failure { error, status: response.status, code: String::new() })
            }
            Err(Failure { error: ObjectError::NotFound(_), .. }) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    async fn has_mark(&self, key: &str, mark: &str) -> Result<bool, Failure> {
        let look = Call::new(Method::Head, Some(key), "look for", "s3:GetObject");
        let response = self.send(&look).await?;
        Ok(response.header(MARK) == Some(mark))
    }

    /// One attempt for a conditional put, whose caller judges failures; patient otherwise.
    async fn upload(&self, key: &str, data: &[u8], mark: Option<&str>, conditional: bool) -> Result<(), Failure> {
        let mut headers = Vec::new();
        headers.extend(mark.map(|mark| (MARK, mark.to_owned())));
        let condition = conditional.then(|| ("if-none-match", "*".to_owned()));
        if data.len() > SINGLE_PUT_BYTES_MAX {
            return self.put_in_parts(key, data, headers, condition).await;
        }
        let mut call = Call::new(Method::Put, Some(key), "write", PUT);
        headers.extend(condition);
        headers.push(("content-md5", self.content_md5_by_turns(data).await));
        call.headers = headers;
        call.body = data;
        match conditional {
            true => self.send(&call).await.map(drop),
            false => self.send_patiently(&call).await.map(drop),
        }
    }

    /// [`content_md5`] that lets others of its executor have their turn: a pack is hashed for as long as dozens of reads take.
    pub(super) async fn content_md5_by_turns(&self, data: &[u8]) -> String {
        let mut hasher = Md5::new();
        for slice in data.chunks(HASH_SLICE_BYTES) {
            hasher.update(slice);
            self.inner.platform.yield_now().await;
        }
        base64(&hasher.finalize())
    }

    fn weaker(&self, why: &str) {
        self.set_conditional(Conditional::Absent);
        tracing::warn!(
            "{}: the store {why}: looking before each put instead, so do not import the same image from two machines \
             at the same time",
            self.inner.place
        );
    }

    pub(super) fn conditional(&self) -> Conditional {
        match self.inner.conditional.load(Ordering::Relaxed) {
            1 => Conditional::Honoured,
            2 => Conditional::Absent,
            _ => Conditional::Unknown,
        }
    }

    fn set_conditional(&self, known: Conditional) {
        self.inner.conditional.store(known as u8, Ordering::Relaxed);
    }
}

/// The value of `Content-MD5`.
pub(super) fn content_md5(data: &[u8]) -> String {
    base64(&Md5::digest(data))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = u32::from_be_bytes([0, group[0], *group.get(1).unwrap_or(&0), *group.get(2).unwrap_or(&0)]);
        for digit in 0..4 {
            let six_bits = (word >> (18 - 6 * digit)) & 63;
            out.push(if digit <= group.len() { char::from(DIGITS[six_bits as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{base64, content_md5};

    #[test]
    fn digests_are_written_in_base64() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(content_md5(b""), "1B2M2Y8AsgTpgAmY7PhCfg==");
    }
}
