//! Extractors of paths and queries. What they reject are our errors, not axum's plain text.

use aide::OperationInput;
use aide::generate::GenContext;
use aide::openapi::Operation;
use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::error::{ApiError, Result};
use super::state::AppState;
use crate::request::{Fields, ValidationError};

/// The parameter of a path, decoded.
#[derive(Debug)]
pub(crate) struct PathName(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for PathName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let path = Path::from_request_parts(parts, state).await;
        let broken = |_| ValidationError::body("the path holds escapes that are not UTF-8");
        path.map(|Path(name)| Self(name)).map_err(|error| broken(error).into())
    }
}

impl OperationInput for PathName {}

/// The parameters of a query, checked like the fields of a form. Unknown ones are ignored.
#[derive(Debug)]
pub(crate) struct QueryFields<T>(pub(crate) T);

impl<T: JsonSchema + DeserializeOwned + 'static> FromRequestParts<AppState> for QueryFields<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self> {
        let query = parts.uri.query().unwrap_or_default();
        let mut fields = Fields::form(form_urlencoded::parse(query.as_bytes()).into_owned())?;
        Ok(Self(fields.read(&state.settings.limits)?))
    }
}

impl<T: JsonSchema> OperationInput for QueryFields<T> {
    fn operation_input(context: &mut GenContext, operation: &mut Operation) {
        Query::<T>::operation_input(context, operation);
    }
}
