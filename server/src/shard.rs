//! A shard: one core's partition of the volumes and of the chunk cache, generic over the platform.

pub mod api;
