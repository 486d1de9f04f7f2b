//! The object store as the control thread reaches it: through the shards, for code that knows only the seam.

use std::ops::Range;

use crate::object_store::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore};
use crate::shard::api::{ObjectOp, ObjectOpReply};

use super::shards::Shards;

impl ObjectStore for Shards {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        data(self.object_op(ObjectOp::Get { key: key.to_string() }).await?)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        Ok(data(self.object_op(ObjectOp::GetRange { key: key.to_string(), range }).await?)?.into())
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.object_op(ObjectOp::Put { key: key.to_string(), data: data.to_vec() }).await.map(drop)
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.object_op(ObjectOp::PutIfAbsent { key: key.to_string(), data: data.to_vec() }).await.map(drop)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        match self.object_op(ObjectOp::List { prefix: prefix.to_string() }).await? {
            ObjectOpReply::Listing(objects) => Ok(objects),
            _ => Err(misanswered()),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        self.object_op(ObjectOp::Delete { key: key.to_string() }).await.map(drop)
    }
}

impl Shards {
    async fn object_op(&self, op: ObjectOp) -> Result<ObjectOpReply, ObjectError> {
        // A shard that does not answer is an object store that can't be reached.
        self.objects(op).await.map_err(|error| ObjectError::Retry(error.message))?
    }
}

fn data(reply: ObjectOpReply) -> Result<Vec<u8>, ObjectError> {
    match reply {
        ObjectOpReply::Data(data) => Ok(data),
        _ => Err(misanswered()),
    }
}

fn misanswered() -> ObjectError {
    ObjectError::Fatal("a shard answered another object operation than the one asked".to_string())
}
