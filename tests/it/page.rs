//! The web page. `tests/clients` looks at it with a browser; here is what no browser shows.

use anyhow::Result;

use crate::engine::{LONG, Server, ready};
use crate::fake::HTTP;

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_and_asks_nobody_else() -> Result<()> {
    let (engine, _strings) = ready().await;
    let server = Server::start(engine, HTTP, LONG).await;
    let files = [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")];
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
    // The policy forbids what stands in the page itself.
    assert!(!page.contains(" style=") && !page.contains(" onclick=\""));
    let info: serde_json::Value =
        reqwest::get(format!("{}/info", server.url)).await?.json().await?;
    assert_eq!(info["schedulers"][0]["name"], "pndm");
    assert_eq!(reqwest::Client::new().delete(&server.url).send().await?.status(), 405);
    Ok(())
}
