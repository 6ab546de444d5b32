//! The contract of the server and of the command line, tested from outside: one binary, so that
//! it links once.

mod access; // keys and CORS
mod batching; // a picture does not depend on its neighbours
mod built_in_net; // the ControlNet of the built-in model
mod cli; // generate, healthcheck, exit codes
mod controlnet; // ControlNets by name
mod corpus; // the fuzz targets on what the fuzzer has found
#[cfg(feature = "cuda")]
mod cuda; // the same on a GPU, or on an emulator of one
mod dialects; // what other servers' clients send to /invocations
mod edges; // connections, slots, bodies and responses that clients hold
mod embeddings; // textual inversion
mod engine; // the engine and its server around a fake model: loading, draining, dying
mod fake; // the fake model
mod floors; // imports run one way
mod harness; // starts the real binary
mod hostile; // malformed requests: a clear answer, and the next one works
mod hub; // a hub on this host: what is fetched, what is cached
mod inputs; // pictures that come in: formats, sizes, masks, and files that mean harm
mod invocations; // every form of body and reply
mod ip_adapters; // IP-Adapters by name
mod jobs; // what survives the process, priorities, lists, webhooks
mod lines; // JSON lines and batch transform
mod loras; // LoRAs by name
mod memory; // models and LoRAs that come and go leave nothing
mod messages; // what errors say, and what the log does not
mod metrics; // what the server says about itself
mod models; // models by name over HTTP: SageMaker's multi-model contract, a folder of models
mod openai; // the Images API
mod openai_usage; // its tokens, partial images, names of models, images in JSON
mod origins; // foreign web pages, proxies and links
mod overload; // too much, too late, too large: what is refused and how
mod package; // a model's files for SageMaker
mod page; // the web page
mod passes; // prompts that change on the way, and what the hires pass has of its own
mod pictures; // against diffusers' pictures, and against their prompts
mod progress; // events and jobs
mod properties; // of the parsers of requests, on random input
mod recorded; // requests of other clients, as recorded
mod refiner; // a second model that takes images over, in every dialect
mod registry; // which models are in memory: room, eviction, deadlines, one device for all
mod safety; // the safety checker, in every dialect
mod scheduling; // fairness, starvation, conservation, with a fake model and real threads
mod sdapi; // AUTOMATIC1111's API
mod sdapi_images; // the same with images
mod sdapi_routes; // its other routes, and what it passes over
mod shelf; // a loader of fake models
mod soak; // many mixed requests: nothing is lost, miscounted or leaked
mod supply; // the bill of materials of the image
mod upscalers; // upscalers by name, in hires passes and alone
mod vae_tiles; // of the VAE, by a field, by an option, and where the whole does not fit
