//! PTX text to functions and variables. A module is scanned once for its top-level directives; a
//! function's body is split into statements only when the function is wanted.
use std::collections::HashMap;

/// A variable with its initial bytes; `refs` are the places that hold addresses of other symbols.
#[derive(Clone, Debug, Default)]
pub struct Var {
    pub size: usize,
    pub align: usize,
    pub init: Vec<u8>,
    pub refs: Vec<(usize, String)>,
}

#[derive(Clone, Copy, Debug)]
pub struct ParamDecl<'a> {
    pub name: &'a str,
    pub size: usize,
    pub align: usize,
}

#[derive(Clone, Debug)]
pub struct Func<'a> {
    pub rets: Vec<ParamDecl<'a>>,
    pub params: Vec<ParamDecl<'a>>,
    pub body: Option<&'a str>,
    pub entry: bool,
}

/// The top level of a module.
#[derive(Default)]
pub struct Unit<'a> {
    pub funcs: HashMap<&'a str, Func<'a>>,
    pub globals: Vec<(&'a str, Var)>,
    pub shared: HashMap<&'a str, Var>,
}

/// One statement of a function body.
#[derive(Clone, Debug)]
pub enum Item<'a> {
    Open,
    Close,
    Label(&'a str),
    /// `.reg`, `.shared`, `.local` or `.param` with the rest of the line.
    Decl(&'a str, &'a str),
    Targets(Vec<&'a str>),
    Inst {
        guard: Option<(&'a str, bool)>,
        op: &'a str,
        args: Vec<&'a str>,
        line: u32,
    },
}

/// Size in bytes of a scalar type.
pub fn type_size(ty: &str) -> Option<usize> {
    Some(match ty.trim_start_matches('.') {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

/// Replaces comments by spaces (lines stay where they are).
pub fn strip_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(p) = rest.find('/') {
        let tail = &rest[p..];
        let end = if tail.starts_with("//") {
            tail.find('\n').unwrap_or(tail.len())
        } else if tail.starts_with("/*") {
            tail.find("*/").map_or(tail.len(), |e| e + 2)
        } else {
            out.push_str(&rest[..=p]);
            rest = &rest[p + 1..];
            continue;
        };
        out.push_str(&rest[..p]);
        out.extend(tail[..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &tail[end..];
    }
    out + rest
}

/// `.align 4 .b8 name[10]` or `.u64 name`, with an optional alignment and vector type.
pub fn declaration(text: &str) -> Result<(&str, usize, usize), String> {
    let bad = || format!("cannot parse declaration `{text}`");
    let (mut align, mut size, mut name, mut lanes, mut pointer) = (0, 0, None, 1, false);
    let mut words = text.split_whitespace();
    while let Some(w) = words.next() {
        match w {
            ".align" => {
                let a = words.next().and_then(|a| a.parse().ok()).ok_or_else(bad)?;
                align = if pointer { align } else { a }; // after .ptr: what it points to
            }
            ".v2" => lanes = 2,
            ".v4" => lanes = 4,
            ".ptr" => pointer = true,
            ".global" | ".shared" | ".const" | ".local" | ".generic" => {}
            _ if w.starts_with('.') => {
                if let Some(s) = type_size(w) {
                    size = s;
                }
            }
            _ => {
                // the rest is the name with its dimensions
                let at = w.as_ptr() as usize - text.as_ptr() as usize;
                name = Some(text[at..].trim());
                break;
            }
        }
    }
    let full = name.ok_or_else(bad)?;
    let name = full.split('[').next().unwrap_or(full).trim();
    let dims = full[name.len()..].split('[').skip(1);
    let mut count = 1;
    for d in dims {
        let d = d.trim_end().trim_end_matches(']').trim();
        count *= if d.is_empty() { 0 } else { integer(d).ok_or_else(bad)? as usize };
    }
    if size == 0 {
        return Err(bad());
    }
    Ok((name, size * lanes * count, if align == 0 { size * lanes } else { align }))
}

/// A decimal, hexadecimal, octal or binary integer with sign and `U` suffix.
pub fn integer(s: &str) -> Option<i128> {
    let (neg, s) = match s.strip_prefix('-') {
        Some(r) => (true, r.trim_start()),
        None => (false, s.strip_prefix('+').unwrap_or(s)),
    };
    let s = s.trim_end_matches(['U', 'u']);
    let v = if let Some(h) = s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        i128::from_str_radix(h, 16).ok()?
    } else if let Some(b) = s.strip_prefix("0b") {
        i128::from_str_radix(b, 2).ok()?
    } else if s.len() > 1 && s.starts_with('0') && s.bytes().all(|c| c.is_ascii_digit()) {
        i128::from_str_radix(s, 8).ok()?
    } else {
        s.parse().ok()?
    };
    Some(if neg { -v } else { v })
}

/// Splits at commas outside brackets.
pub fn split_args(s: &str) -> Vec<&str> {
    let (mut depth, mut from, mut out) = (0, 0, Vec::new());
    for (p, c) in s.bytes().enumerate() {
        match c {
            b'{' | b'[' | b'(' => depth += 1,
            b'}' | b']' | b')' => depth -= 1,
            b',' if depth == 0 => {
                out.push(s[from..p].trim());
                from = p + 1;
            }
            _ => {}
        }
    }
    let last = s[from..].trim();
    if !last.is_empty() {
        out.push(last);
    }
    out
}

/// Position just after the bracket that closes the one at `open`.
fn closing(s: &str, open: usize) -> Result<usize, String> {
    let mut depth = 0;
    for (p, c) in s.bytes().enumerate().skip(open) {
        match c {
            b'{' | b'(' => depth += 1,
            b'}' | b')' => {
                depth -= 1;
                if depth == 0 {
                    return Ok(p + 1);
                }
            }
            _ => {}
        }
    }
    Err("unbalanced brackets".into())
}

fn params(list: &str) -> Result<Vec<ParamDecl<'_>>, String> {
    split_args(list)
        .into_iter()
        .map(|p| {
            let p = p
                .trim()
                .strip_prefix(".param")
                .ok_or_else(|| format!("register parameter `{p}`"))?;
            let (name, size, align) = declaration(p)?;
            Ok(ParamDecl { name, size, align })
        })
        .collect()
}

/// Scans a module whose comments are stripped.
pub fn unit(text: &str) -> Result<Unit<'_>, String> {
    let mut u = Unit::default();
    let mut at = 0;
    while let Some(skip) = text[at..].find(|c: char| !c.is_whitespace() && c != '\0' && c != ';') {
        at += skip;
        let rest = &text[at..];
        // the line-oriented directives
        let word = rest.split_whitespace().next().unwrap_or("");
        if matches!(word, ".version" | ".target" | ".address_size" | ".file" | ".loc") {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        }
        if word == ".section" {
            let open = rest.find('{').ok_or("bad section")?;
            at += closing(rest, open)?;
            continue;
        }
        let head_end =
            rest.find(['{', ';', '=', '(']).ok_or_else(|| format!("unexpected `{word}`"))?;
        let head = &rest[..head_end];
        let words: Vec<&str> = head.split_whitespace().collect();
        if words.contains(&".entry") || words.contains(&".func") {
            at += function(&mut u, rest, words.contains(&".entry"))?;
            continue;
        }
        let end = statement_end(rest);
        variable(&mut u, &rest[..end], &words)?;
        at += end + 1;
    }
    Ok(u)
}

/// Position of the `;` that ends a statement (strings and braces may come before it).
fn statement_end(s: &str) -> usize {
    let mut quoted = false;
    s.bytes()
        .position(|c| {
            quoted ^= c == b'"';
            c == b';' && !quoted
        })
        .unwrap_or(s.len())
}

fn function<'a>(u: &mut Unit<'a>, rest: &'a str, entry: bool) -> Result<usize, String> {
    let kw = if entry { ".entry" } else { ".func" };
    let mut at = rest.find(kw).unwrap_or(0) + kw.len();
    let skip_ws = |at: usize| at + rest[at..].find(|c: char| !c.is_whitespace()).unwrap_or(0);
    at = skip_ws(at);
    let mut rets = Vec::new();
    if rest[at..].starts_with('(') {
        let e = closing(rest, at)?;
        rets = params(&rest[at + 1..e - 1])?;
        at = skip_ws(e);
    }
    let name_end = at
        + rest[at..]
            .find(|c: char| c.is_whitespace() || "({;".contains(c))
            .ok_or("bad function")?;
    let name = &rest[at..name_end];
    at = skip_ws(name_end);
    let mut list = Vec::new();
    if rest[at..].starts_with('(') {
        let e = closing(rest, at)?;
        list = params(&rest[at + 1..e - 1])?;
        at = e;
    }
    // performance directives may stand before the body
    let stop = at + rest[at..].find(['{', ';']).ok_or("function without body")?;
    let (body, end) = if rest[stop..].starts_with('{') {
        let e = closing(rest, stop)?;
        (Some(&rest[stop + 1..e - 1]), e)
    } else {
        (None, stop + 1)
    };
    if body.is_some() || !u.funcs.contains_key(name) {
        u.funcs.insert(name, Func { rets, params: list, body, entry });
    }
    Ok(end)
}

fn variable<'a>(u: &mut Unit<'a>, text: &'a str, words: &[&str]) -> Result<(), String> {
    let Some(space) = words.iter().find(|w| matches!(**w, ".global" | ".const" | ".shared")) else {
        return Ok(()); // .pragma and the like
    };
    let (decl, init) = text.split_once('=').unwrap_or((text, ""));
    let at = decl.find(*space).unwrap_or(0) + space.len();
    let elem = decl[at..].split_whitespace().find_map(type_size).unwrap_or(1);
    // an array without a length takes its initialiser's
    let (name, mut size, align) = declaration(decl[at..].trim())?;
    let mut var = Var { align, ..Var::default() };
    for v in init.trim().trim_start_matches('{').trim_end_matches('}').split(',') {
        let v = v.trim().trim_matches(['{', '}']).trim();
        if v.is_empty() {
            continue;
        }
        if let Some(n) = integer(v) {
            var.init.extend_from_slice(&n.to_le_bytes()[..elem]);
        } else if let Some(b) = float_bits(v) {
            var.init.extend_from_slice(&b.to_le_bytes()[..elem]);
        } else {
            let sym = v.strip_prefix("generic(").map_or(v, |s| s.trim_end_matches(')'));
            var.refs.push((var.init.len(), sym.trim().to_string()));
            var.init.extend_from_slice(&[0; 8][..elem]);
        }
    }
    size = size.max(var.init.len());
    var.size = size;
    if *space == ".shared" {
        u.shared.insert(name, var);
    } else {
        u.globals.push((name, var));
    }
    Ok(())
}

/// `0f3F800000` and `0d3FF0000000000000`.
pub fn float_bits(s: &str) -> Option<u64> {
    let (neg, s) = s.strip_prefix('-').map_or((false, s), |r| (true, r));
    let b = s.as_bytes();
    let (len, flip) = match (b.first()?, b.get(1)?) {
        (b'0', b'f' | b'F') => (8, 1u64 << 31),
        (b'0', b'd' | b'D') => (16, 1u64 << 63),
        _ => return None,
    };
    let v = (b.len() == len + 2).then(|| u64::from_str_radix(&s[2..], 16).ok())??;
    Some(if neg { v ^ flip } else { v })
}

/// Splits a function body into statements. `first_line` numbers the body's first line.
pub fn statements(body: &str, first_line: u32) -> Result<Vec<Item<'_>>, String> {
    let mut out = Vec::new();
    let (mut at, mut line, mut counted) = (0, first_line, 0);
    loop {
        let Some(skip) = body[at..].find(|c: char| !c.is_whitespace() && c != ';') else {
            return Ok(out);
        };
        at += skip;
        line += body[counted..at].bytes().filter(|&c| c == b'\n').count() as u32;
        counted = at;
        let rest = &body[at..];
        match rest.as_bytes()[0] {
            b'{' => {
                out.push(Item::Open);
                at += 1;
                continue;
            }
            b'}' => {
                out.push(Item::Close);
                at += 1;
                continue;
            }
            _ => {}
        }
        let word_end =
            rest.find(|c: char| c.is_whitespace() || ";:,({[".contains(c)).unwrap_or(rest.len());
        let word = &rest[..word_end];
        let after = rest[word_end..].trim_start();
        if after.starts_with(':') && !word.starts_with('.') {
            out.push(Item::Label(word));
            at += rest.find(':').unwrap_or(0) + 1;
            continue;
        }
        if word == ".loc" || word == ".file" {
            at += rest.find('\n').unwrap_or(rest.len());
            continue;
        }
        let end = statement_end(rest);
        let text = rest[..end].trim();
        at += end;
        if let Some(tail) = word.strip_prefix('.') {
            // `.reg.b16 x` may be written without a space
            let word = &word[..tail.find('.').map_or(word.len(), |p| p + 1)];
            match word {
                ".branchtargets" => out.push(Item::Targets(split_args(text[word.len()..].trim()))),
                ".pragma" | ".callprototype" => {}
                _ => out.push(Item::Decl(word, text[word.len()..].trim())),
            }
            continue;
        }
        let (mut guard, mut text) = (None, text);
        if let Some(g) = text.strip_prefix('@') {
            let (p, rest) = g.split_once(char::is_whitespace).ok_or("bad guard")?;
            guard = Some(p.strip_prefix('!').map_or((p, false), |p| (p, true)));
            text = rest.trim_start();
        }
        let e = text.find(|c: char| c.is_whitespace() || c == '{').unwrap_or(text.len());
        out.push(Item::Inst { guard, op: &text[..e], args: split_args(text[e..].trim()), line });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals() {
        assert_eq!(integer("-5"), Some(-5));
        assert_eq!(integer("0x8000U"), Some(0x8000));
        assert_eq!(float_bits("0f3F800000"), Some(0x3f80_0000));
        assert_eq!(float_bits("0dBFF0000000000000"), Some(0xbff0_0000_0000_0000));
        assert_eq!(declaration(".align 8 .b8 x[144]"), Ok(("x", 144, 8)));
        assert_eq!(declaration(".u64 p_0"), Ok(("p_0", 8, 8)));
    }

    #[test]
    fn bodies() {
        let s =
            statements(".reg .b32 %r<4>;\n{ mov.b32 %r1, {0,%rs1};}\n@!%p1 bra L1;\nL1:\n ret;", 1)
                .unwrap();
        assert_eq!(s.len(), 7);
        assert!(
            matches!(&s[2], Item::Inst { op: "mov.b32", args, line: 2, .. } if args[1] == "{0,%rs1}")
        );
        assert!(matches!(s[4], Item::Inst { guard: Some(("%p1", true)), op: "bra", .. }));
    }

    #[test]
    fn units() {
        let u = unit(
            ".version 9.0\n.target sm_80\n.global .align 1 .b8 s[2] = {97, 0};\n\
            .func (.param .b64 r) f\n(\n.param .b64 a,\n.param .b64 b\n)\n;\n\
            .visible .entry k(\n.param .u64 k_0,\n.param .align 2 .b8 k_1[2]\n)\n.maxntid 128, 1, 1\n{\nret;\n}\n",
        )
        .unwrap();
        assert_eq!(u.globals[0].1.init, [97, 0]);
        assert_eq!(u.funcs["k"].params.len(), 2);
        assert!(u.funcs["k"].entry && u.funcs["f"].body.is_none());
    }
}
