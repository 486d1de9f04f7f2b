//! Request parts of the API's handlers, whose rejections are problems like every other error.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::problem::Problem;

/// A client that has not sent the few hundred bytes of its request by then is answered without them.
pub(super) const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// A JSON body. Its errors name the field.
pub(super) struct Body<T>(pub T);

/// The query string.
pub(super) struct Params<T>(pub T);

/// The one variable segment of the path.
pub(super) struct Segment(pub String);

/// The two variable segments of the path: a name, and the number of a block.
pub(super) struct BlockOf(pub String, pub u32);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let parsed = tokio::time::timeout(BODY_DEADLINE, Json::from_request(request, state)).await;
        let parsed: Result<Json<T>, JsonRejection> = parsed.map_err(|_| Problem::body_late(BODY_DEADLINE))?;
        parsed.map(|Json(body)| Body(body)).map_err(|e| Problem::of_rejection(e.status(), e.body_text()))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let parsed: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        parsed.map(|Query(params)| Params(params)).map_err(|e| Problem::of_rejection(e.status(), e.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let parsed: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        parsed.map(|Path(segment)| Segment(segment)).map_err(|e| Problem::of_rejection(e.status(), e.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for BlockOf {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let parsed: Result<Path<(String, u32)>, PathRejection> = Path::from_request_parts(parts, state).await;
        parsed
            .map(|Path((name, index))| BlockOf(name, index))
            .map_err(|e| Problem::of_rejection(e.status(), e.body_text()))
    }
}
