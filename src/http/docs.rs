//! The descriptions of routes in `/openapi.json`. aide and schemars generate the document from the
//! routers and the types. Unlike utoipa, they describe a whole router at once, need no attribute at
//! each handler, and give the schemas as values, against which requests are checked.

use aide::axum::ApiRouter;
use aide::generate::in_context;
use aide::openapi::{MediaType, ReferenceOr, RequestBody, Response, SchemaObject, StatusCode};
use aide::transform::TransformOperation;
use aide::{OperationInput, OperationOutput};
use axum::Json;
use schemars::{JsonSchema, Schema, json_schema};

use super::admission::{Admitted, AdmittedSmall, ClientId};
use super::error::ApiError;
use super::links::Links;
use super::state::AppState;

/// The media types of image files.
pub(crate) const IMAGES: [&str; 3] = ["image/png", "image/jpeg", "image/webp"];

/// The media type of event streams.
pub(crate) const EVENTS: [&str; 1] = ["text/event-stream"];

const JSON: &str = "application/json";

impl OperationInput for Admitted {}
impl OperationInput for AdmittedSmall {}
impl OperationInput for ClientId {}
impl OperationInput for Links {}
impl OperationOutput for ApiError {
    type Inner = Self;
}

/// The description of an operation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Docs {
    summary: &'static str,
    body: Option<RequestBody>,
    responses: Vec<(u16, Response)>,
}

impl Docs {
    /// An operation with this summary.
    pub(crate) fn of(summary: &'static str) -> Self {
        Self { summary, ..Self::default() }
    }

    /// The operation takes JSON of this type.
    pub(crate) fn takes<T: JsonSchema>(self) -> Self {
        self.takes_as(JSON, schema::<T>())
    }

    /// The operation takes a body of this media type, too.
    pub(crate) fn takes_as(mut self, media_type: &str, schema: Schema) -> Self {
        let body = self.body.get_or_insert_default();
        body.required = true;
        body.content.insert(media_type.into(), content(schema));
        self
    }

    /// The operation responds with a JSON object that has these fields, or with one of these media
    /// types.
    pub(crate) fn gives(mut self, status: u16, fields: &[&str], media_types: &[&str]) -> Self {
        let mut response = Response { description: self.summary.into(), ..Response::default() };
        if !fields.is_empty() {
            let object = json_schema!({ "type": "object", "required": fields });
            response.content.insert(JSON.into(), content(object));
        }
        let any = |name: &&str| ((*name).to_owned(), content(Schema::default()));
        response.content.extend(media_types.iter().map(any));
        self.responses.push((status, response));
        self
    }

    /// The description as aide applies it.
    pub(crate) fn describe(self) -> impl FnOnce(TransformOperation<'_>) -> TransformOperation<'_> {
        move |operation| {
            let mut operation = operation.summary(self.summary);
            let inner = operation.inner_mut();
            inner.request_body = self.body.map(ReferenceOr::Item);
            let responses = &mut inner.responses.get_or_insert_default().responses;
            for (status, response) in self.responses {
                responses.insert(StatusCode::Code(status), ReferenceOr::Item(response));
            }
            operation
        }
    }
}

/// Puts a router's operations into a group whose errors have the schema of `E`.
pub(crate) fn group<E: JsonSchema>(routes: ApiRouter<AppState>, tag: &str) -> ApiRouter<AppState> {
    routes.with_path_items(|path| {
        path.tag(tag).default_response_with::<Json<E>, _>(|error| error.description("Error"))
    })
}

/// Puts a router's operations into a group that needs a key where keys are configured.
pub(crate) fn keyed<E: JsonSchema>(routes: ApiRouter<AppState>, tag: &str) -> ApiRouter<AppState> {
    group::<E>(routes, tag).with_path_items(|path| {
        let path = path.security_requirement_multi([""; 0]).security_requirement("bearer");
        path.security_requirement("basic").security_requirement("key")
    })
}

/// The schema of a type.
pub(crate) fn schema<T: JsonSchema>() -> Schema {
    in_context(|context| context.schema.subschema_for::<T>())
}

fn content(json_schema: Schema) -> MediaType {
    let schema = SchemaObject { json_schema, external_docs: None, example: None };
    MediaType { schema: Some(schema), ..MediaType::default() }
}
