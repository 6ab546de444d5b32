//! The floors of both crates hold: no import runs up, no two rooms import each other in a circle,
//! and no file takes anything from the `mod.rs` above it. A room is a file, or a folder with all
//! that is in it. Code under `#[cfg(test)]` may import what it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::TokenStream;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, Meta, UseTree};

/// A folder, and its rooms from the roof to the ground. Rooms of one floor may import each other
/// in one direction.
type Floors = &'static [(&'static str, &'static [&'static [&'static str]])];

const SERVER: Floors = &[
    (
        "",
        &[
            &["main"],
            &["lib"],
            &["server", "cli"],
            &["http"],
            &["registry"],
            &["request", "engine"],
            &["source", "image", "telemetry", "host", "options"],
        ],
    ),
    (
        "http",
        &[
            &["mod"],
            &["router", "connections"],
            &["invocations", "openai", "a1111", "admin", "page"],
            &["admission", "drawing", "streaming", "unsent", "docs", "extract"],
            &["links"],
            &["middleware"],
            &["state"],
            &["store", "reading", "coding"],
            &["access", "deadline", "error", "slots", "progress", "headers", "ids"],
        ],
    ),
];

const MODELS: Floors = &[(
    "",
    &[
        &["lib"],
        &["pipeline"],
        &["networks"],
        &["layers", "text"],
        &["files", "sampling"],
        &["ops", "picture", "error"],
    ],
)];

#[test]
fn the_floors_of_the_server_run_one_way() {
    assert_sound(Path::new("src"), SERVER);
}

#[test]
fn the_floors_of_the_models_run_one_way() {
    assert_sound(Path::new("models/src"), MODELS);
}

fn assert_sound(root: &Path, floors: Floors) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let mut files = BTreeMap::new();
    read(&root, "", &mut files);
    let wrong = violations(&files, floors);
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), root.display(), wrong.join("\n"));
}

/// Every source file below a folder, by its path without `.rs`.
fn read(folder: &Path, path: &str, files: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let entry = entry.expect("an entry").path();
        let stem = entry.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        let name = if path.is_empty() { stem.into() } else { format!("{path}/{stem}") };
        if entry.is_dir() {
            read(&entry, &name, files);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            files.insert(name, fs::read_to_string(entry).expect("a source file"));
        }
    }
}

/// What is wrong with the imports between these files, a sentence each.
fn violations(files: &BTreeMap<String, String>, floors: Floors) -> Vec<String> {
    // `main` is the root of another crate, which imports this one by its name.
    let files_of_crate = files.keys().filter(|file| *file != "main");
    let modules: BTreeMap<Vec<String>, &str> =
        files_of_crate.map(|file| (module(file), file.as_str())).collect();
    let mut found = BTreeSet::new();
    let mut test_files = BTreeSet::new();
    for (file, text) in files {
        let mut reader = Reader { module: module(file), ..Reader::default() };
        reader.visit_file(&syn::parse_file(text).unwrap_or_else(|e| panic!("{file}: {e}")));
        test_files.extend(reader.tests);
        let to = reader.paths.iter().filter_map(|path| resolve(path, &modules));
        found.extend(to.filter(|to| to != file).map(|to| (file.clone(), to.to_owned())));
    }
    let of_tests =
        |file: &String| (0..=module(file).len()).any(|n| test_files.contains(&module(file)[..n]));
    found.retain(|(from, to)| !of_tests(from) && !of_tests(to));
    let mut wrong: Vec<_> = found
        .iter()
        .filter(|(from, to)| is_above(to, from))
        .map(|(from, to)| format!("{from} takes from {to}, the module above it"))
        .collect();
    wrong.extend(upward(&found, files, floors));
    wrong.extend(circles(&found));
    wrong
}

type Arrows = BTreeSet<(String, String)>;

/// The module that a file is: `["http", "error"]` of `http/error`, `["http"]` of `http/mod`.
fn module(file: &str) -> Vec<String> {
    let names = file.split('/').map(str::to_owned);
    let mut names: Vec<_> = names.collect();
    if matches!(names.last().map(String::as_str), Some("mod")) || ["lib", "main"].contains(&file) {
        names.pop();
    }
    names
}

/// The file in which an absolute path ends: that of the longest module in front of it.
fn resolve<'a>(path: &[String], modules: &BTreeMap<Vec<String>, &'a str>) -> Option<&'a str> {
    (0..=path.len()).rev().find_map(|n| modules.get(&path[..n]).copied())
}

fn is_above(high: &str, low: &str) -> bool {
    let (high, low) = (module(high), module(low));
    high.len() < low.len() && low.starts_with(&high)
}

/// Arrows from a lower floor to a higher one, and rooms that no floor names.
fn upward(arrows: &Arrows, files: &BTreeMap<String, String>, floors: Floors) -> Vec<String> {
    let mut wrong = Vec::new();
    for (folder, floors) in floors {
        let floor = |room: &str| floors.iter().position(|floor| floor.contains(&room));
        let rooms: BTreeSet<_> = files.keys().filter_map(|file| room(folder, file)).collect();
        let unknown = rooms.iter().filter(|room| floor(room).is_none());
        wrong.extend(unknown.map(|room| format!("no floor of {folder:?} names {room}")));
        for (from, to) in arrows {
            let floor = |file| floor(room(folder, file)?);
            let (Some(low), Some(high)) = (floor(from), floor(to)) else { continue };
            if low > high {
                wrong.push(format!("{from} imports {to}, which is a floor above it"));
            }
        }
    }
    wrong
}

/// The room of a folder in which a file lies.
fn room<'a>(folder: &str, file: &'a str) -> Option<&'a str> {
    let inside = match folder {
        "" => file,
        _ => file.strip_prefix(folder)?.strip_prefix('/')?,
    };
    inside.split('/').next()
}

/// One circle of rooms for each folder that has any, with the files whose imports close it.
fn circles(arrows: &Arrows) -> Vec<String> {
    let folders = arrows
        .iter()
        .flat_map(|(from, _)| from.match_indices('/').map(|(end, _)| &from[..end]).chain([""]));
    let folders: BTreeSet<_> = folders.collect();
    folders.into_iter().filter_map(|folder| circle(folder, arrows)).collect()
}

fn circle(folder: &str, arrows: &Arrows) -> Option<String> {
    let mut next: BTreeMap<&str, BTreeMap<&str, (&str, &str)>> = BTreeMap::new();
    for (from, to) in arrows {
        let (Some(a), Some(b)) = (room(folder, from), room(folder, to)) else { continue };
        if a != b {
            next.entry(a).or_default().entry(b).or_insert((from, to));
        }
    }
    // What leads nowhere, or only to what leads nowhere, is in no circle.
    while let Some(end) = {
        let mut rooms = next.iter();
        rooms.find(|(_, to)| to.keys().all(|to| !next.contains_key(to))).map(|(room, _)| *room)
    } {
        next.remove(end);
    }
    let mut at = *next.keys().next()?;
    let mut way = Vec::new();
    while !way.contains(&at) {
        way.push(at);
        at = next[at].keys().find(|to| next.contains_key(*to))?;
    }
    let round = &way[way.iter().position(|room| *room == at)?..];
    let closing = round.iter().zip(round.iter().cycle().skip(1));
    let imports = closing.map(|(a, b)| {
        let (from, to) = next[a][b];
        format!("{from} -> {to}")
    });
    Some(format!("a circle: {}", imports.collect::<Vec<_>>().join(", ")))
}

/// Collects the paths of a file that begin at `crate`, `self` or `super`, made absolute.
#[derive(Default)]
struct Reader {
    module: Vec<String>,
    paths: Vec<Vec<String>>,
    /// Modules that only tests have.
    tests: BTreeSet<Vec<String>>,
}

impl Reader {
    fn note(&mut self, path: &[String]) {
        let mut absolute = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            _ => return,
        };
        for name in path {
            match name.as_str() {
                "crate" | "self" => {}
                "super" => drop(absolute.pop()),
                _ => absolute.push(name.clone()),
            }
        }
        self.paths.push(absolute);
    }

    fn note_use(&mut self, before: &[String], tree: &UseTree) {
        let joined = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.note_use(&joined(&path.ident), &path.tree),
            UseTree::Name(name) => self.note(&joined(&name.ident)),
            UseTree::Rename(rename) => self.note(&joined(&rename.ident)),
            UseTree::Glob(_) => self.note(before),
            UseTree::Group(group) => {
                for item in &group.items {
                    self.note_use(before, item);
                }
            }
        }
    }

    /// Paths in the arguments of a macro, which are tokens and no syntax.
    fn note_tokens(&mut self, tokens: &TokenStream) {
        let text = tokens.to_string().replace(' ', "");
        let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        for word in text.split(|c| !is_name(c)) {
            let path: Vec<_> = word.split("::").map(str::to_owned).collect();
            if path.len() > 1 {
                self.note(&path);
            }
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_for_tests(attributes(item)) {
            visit::visit_item(self, item);
        } else if let Item::Mod(ItemMod { ident, content: None, .. }) = item {
            self.tests.insert([&self.module[..], &[ident.to_string()]].concat());
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.note_use(&[], &item.tree);
    }

    /// `pub(in path)` takes nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if names.len() > 1 {
            self.note(&names);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.note_tokens(&call.tokens);
        visit::visit_macro(self, call);
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        Meta::Path(path) => path.is_ident("test"),
        Meta::NameValue(_) => false,
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Floors = &[("", &[&["lib"], &["high"], &["low", "ground"]])];

    fn of(files: &[(&str, &str)]) -> Vec<String> {
        let files = files.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned()));
        violations(&files.collect(), TWO)
    }

    #[test]
    fn downwards_is_sound() {
        let files = [
            ("lib", "mod high; mod low; mod ground; pub use high::A;"),
            ("high/mod", "mod part; mod other; pub use part::A; use crate::low::B;"),
            ("high/part", "use super::other::C; pub struct A;"),
            ("high/other", "pub struct C; #[cfg(test)] mod tests { use crate::A; }"),
            ("low", "use crate::ground::{self, D}; #[cfg(test)] mod tests;"),
            ("low/tests", "use super::B; use crate::A;"),
            ("ground", "pub(in crate::ground) struct D; fn f() { self::g() } fn g() {}"),
        ];
        assert_eq!(of(&files), Vec::<String>::new());
    }

    #[test]
    fn upwards_is_found_in_imports_paths_and_macros() {
        for text in [
            "use crate::{ground, high::A};",
            "use super::high as h;",
            "fn f() { crate::high::g() }",
            "impl crate::high::T for X {}",
            "fn f() { println!(\"{}\", crate::high::A) }",
            "mod inside { use super::super::high::*; }",
        ] {
            let wrong = of(&[("high", ""), ("low", text), ("ground", "")]);
            assert_eq!(wrong, ["low imports high, which is a floor above it"], "{text}");
        }
    }

    #[test]
    fn a_child_takes_nothing_from_above() {
        for text in
            ["use super::A;", "use super::*;", "fn f() -> super::A {}", "use crate::high::A;"]
        {
            let wrong = of(&[("high/mod", "mod part;"), ("high/part", text)]);
            assert_eq!(wrong, ["high/part takes from high/mod, the module above it"], "{text}");
        }
    }

    #[test]
    fn circles_are_found_in_folders_and_between_them() {
        let files = [
            ("high/a", "use super::b::B;"),
            ("high/b", "use super::c::C;"),
            ("high/c", "use super::a::A;"),
            ("low/x", "use crate::ground::y::Y;"),
            ("low/z", ""),
            ("ground/y", "use crate::low::z::Z;"),
        ];
        let wrong = [
            "a circle: ground/y -> low/z, low/x -> ground/y",
            "a circle: high/a -> high/b, high/b -> high/c, high/c -> high/a",
        ];
        assert_eq!(of(&files), wrong);
    }

    #[test]
    fn rooms_without_a_floor_are_named() {
        assert_eq!(of(&[("attic", "")]), ["no floor of \"\" names attic"]);
    }
}
