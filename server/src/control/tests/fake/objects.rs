//! The fake shards' object store: a map, with faults.

use super::{Fault, World};
use crate::object_store::{ObjectError, ObjectMeta};
use crate::shard::api::{ObjectOp, ObjectOpReply};

pub(super) fn object_op(world: &mut World, op: ObjectOp) -> std::result::Result<ObjectOpReply, ObjectError> {
    if world.fault == Some(Fault::ObjectStore) {
        return Err(ObjectError::Retry("unreachable".to_string()));
    }
    let objects = &mut world.objects;
    match op {
        ObjectOp::Get { key } => objects.get(&key).cloned().map(ObjectOpReply::Data).ok_or(ObjectError::NotFound(key)),
        ObjectOp::GetRange { key, range } => {
            let data = objects.get(&key).ok_or_else(|| ObjectError::NotFound(key.clone()))?;
            let part = data.get(range.start as usize..range.end as usize);
            part.map(|part| ObjectOpReply::Data(part.to_vec())).ok_or(ObjectError::Corrupt(key))
        }
        ObjectOp::PutIfAbsent { key, .. } if objects.contains_key(&key) => Err(ObjectError::AlreadyExists(key)),
        ObjectOp::PutIfAbsent { key, data } => {
            objects.insert(key, data);
            match world.fault {
                Some(Fault::LostAnswers) => Err(ObjectError::Retry("no answer".to_string())),
                _ => Ok(ObjectOpReply::Done),
            }
        }
        ObjectOp::Put { key, data } => {
            if world.fault == Some(Fault::ManifestVanishesOnReference) {
                objects.retain(|key, _| !key.starts_with("snapshots/"));
            }
            objects.insert(key, data);
            Ok(ObjectOpReply::Done)
        }
        ObjectOp::Delete { key } => {
            objects.remove(&key);
            Ok(ObjectOpReply::Done)
        }
        ObjectOp::List { prefix } => {
            let matching = objects.iter().filter(|(key, _)| key.starts_with(&prefix));
            let meta =
                |(key, data): (&String, &Vec<u8>)| ObjectMeta { key: key.clone(), size_bytes: data.len() as u64 };
            Ok(ObjectOpReply::Listing(matching.map(meta).collect()))
        }
    }
}
