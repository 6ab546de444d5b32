//! The web page: headers, policy and documents. `tests/clients` tests it in a browser.

use anyhow::Result;

use crate::engine::{LONG, Server, ready};
use crate::fake::HTTP;

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_complete_and_contacts_no_other_host() -> Result<()> {
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let files = [
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/page/queue.js", "text/javascript"),
        ("/docs.js", "text/javascript"),
    ];
    let mut page = String::new();
    for (path, media_type) in files {
        let reply = reqwest::get(format!("{}{path}", server.url)).await?;
        assert_eq!(reply.status(), 200, "{path}");
        let header = |name: &str| reply.headers()[name].to_str().map(str::to_owned);
        assert!(header("content-type")?.starts_with(media_type));
        assert!(
            header("content-security-policy")?.starts_with("default-src 'none'; script-src 'self'")
        );
        assert_eq!(header("x-content-type-options")?, "nosniff");
        let text = reply.text().await?;
        let address = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!address.contains("://"), "{path} names another host");
        page += &text;
    }
    // The policy forbids inline styles and handlers.
    assert!(!page.contains(" style=") && !page.contains(" onclick=\""));
    let info: serde_json::Value =
        reqwest::get(format!("{}/info", server.url)).await?.json().await?;
    assert_eq!(info["schedulers"][0]["name"], "pndm");
    assert_eq!(info["schedulers"][0]["schedules"], serde_json::json!(["model", "sgm_uniform"]));
    assert_eq!(info["schedules"][1]["title"], "Karras");
    let document = reqwest::get(format!("{}/openapi.json", server.url)).await?;
    let document: serde_json::Value = document.json().await?;
    let operations = document["paths"].as_object().expect("paths").iter();
    for (path, methods) in operations {
        for method in methods.as_object().expect("methods").keys() {
            let method = reqwest::Method::from_bytes(method.to_uppercase().as_bytes())?;
            let reply = reqwest::Client::new().request(method, format!("{}{path}", server.url));
            let text = reply.body("{}").send().await?.text().await?;
            let nowhere = ["no such route", "does not support this method"];
            assert!(!nowhere.iter().any(|nothing| text.contains(nothing)), "{path}: {text}");
        }
    }
    assert!(document["paths"]["/models/{name}"]["post"]["requestBody"].is_object());
    let native = &document["paths"]["/v1/invocations"]["post"]["requestBody"]["content"];
    let fields = &native["application/json"]["schema"]["properties"];
    assert_eq!(fields["steps"]["maximum"], HTTP.limits.max_steps);
    assert!(fields["image"]["description"].is_string() && fields["width"]["minimum"] == 8);
    assert_eq!(reqwest::Client::new().delete(&server.url).send().await?.status(), 405);
    let images = format!("{}/v1/images/generations", server.url);
    let asked = reqwest::Client::new().request(reqwest::Method::OPTIONS, images).send().await?;
    assert_eq!((asked.status().as_u16(), &asked.headers()["allow"]), (204, &"POST".parse()?));
    Ok(())
}
