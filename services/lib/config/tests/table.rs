//! What wins, and what is said about what is wrong.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;

use config::{Config, ConfigError};
use serde::Deserialize;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Router {
    listen: SocketAddr,
    max_concurrent: usize,
    ratio: f64,
    strict: bool,
    wire: Wire,
    token: Option<String>,
    names: Vec<String>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Wire {
    InProcess,
    Nats,
}

impl Default for Router {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            max_concurrent: 64,
            ratio: 0.5,
            strict: false,
            wire: Wire::InProcess,
            token: None,
            names: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Needy {
    #[allow(dead_code)]
    threads: usize,
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn resolve(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::resolve(Some((Path::new("janua.toml"), file)), pairs(environment), &pairs(flags))
}

fn router(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Router, ConfigError> {
    resolve(file, environment, flags)?.section("router")
}

#[test]
fn flag_beats_variable_beats_file_beats_default() {
    let file = "[router]\nmax_concurrent = 1\n";
    let variable = [
        ("JANUA_ROUTER_MAX_CONCURRENT", "2"),
        ("PATH", "/bin"),
        ("JANUA_ROUTER_SERVICE_HOST", "10.0.0.1"),
        ("JANUA_ROUTER_PORT", "tcp://x"),
    ];
    let flag = [("router.max_concurrent", "3")];
    for (expected, got) in
        [(64, router("", &[], &[])), (1, router(file, &[], &[])), (2, router(file, &variable, &[])), (3, router(file, &variable, &flag))]
    {
        assert_eq!(got.unwrap().max_concurrent, expected);
    }
}

#[test]
fn every_type_is_read_from_file_and_text() {
    let expected = Router {
        listen: "0.0.0.0:1".parse().unwrap(),
        max_concurrent: 7,
        ratio: 1.0,
        strict: true,
        wire: Wire::Nats,
        token: Some("123".to_owned()),
        names: vec!["a".to_owned(), "b".to_owned()],
    };
    let file =
        "[router]\nlisten = '0.0.0.0:1'\nmax_concurrent = 7\nratio = 1\nstrict = true\nwire = 'nats'\ntoken = '123'\nnames = ['a', 'b']\n";
    assert_eq!(router(file, &[], &[]).unwrap(), expected);
    let flags = [
        ("router.listen", "0.0.0.0:1"),
        ("router.max_concurrent", "7"),
        ("router.ratio", "1"),
        ("router.strict", "true"),
        ("router.wire", "nats"),
        ("router.token", "123"),
        ("router.names", "a, b"),
    ];
    assert_eq!(router("", &[], &flags).unwrap(), expected);
    assert_eq!(router("[router]\ntoken = 'x'", &[("JANUA_ROUTER_TOKEN", "")], &[]).unwrap().token, None);
}

#[test]
fn what_is_wrong_is_named() {
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case; 15] = [
        ("[router]\nlistn = 1", &[], &[], &["router.listn: unknown key (in janua.toml)", "did you mean listen?"]),
        ("[router]\nzzz = 1", &[], &[], &["router.zzz: unknown key (in janua.toml)"]),
        ("[roter]\nlisten = 1", &[], &[], &["roter: unknown section (in janua.toml)", "did you mean router?"]),
        ("[roter]\n", &[], &[], &["roter: unknown section"]),
        ("router = 1", &[], &[], &["router: a table is expected (in janua.toml)"]),
        ("[router]\nmax_concurrent = 'many'", &[], &[], &["router.max_concurrent: ", "expected usize (in janua.toml)"]),
        ("[router]\nmax_concurrent = -1", &[], &[], &["router.max_concurrent: ", "`-1`"]),
        ("[router]\nwire = 'pigeon'", &[], &[], &["router.wire: unknown variant `pigeon`", "in-process"]),
        ("[router]\nlisten = 'here'", &[], &[], &["router.listen: ", "socket address"]),
        ("", &[("JANUA_ROUTER_RATIO", "half")], &[], &["router.ratio: \"half\" is not a number (from the variable JANUA_ROUTER_RATIO)"]),
        ("", &[("JANUA_ROUTER_RATE", "1")], &[], &["router.rate: unknown key (from the variable JANUA_ROUTER_RATE)"]),
        ("", &[("JANUA_ROOTER_RATIO", "1")], &[], &["rooter: unknown section (from the variable JANUA_ROOTER_RATIO)"]),
        ("", &[], &[("router.strict", "yes")], &["router.strict: \"yes\" is not true or false (from --set router.strict)"]),
        ("", &[], &[("strict", "yes")], &["strict: a setting is named section.key (from --set strict)"]),
        ("[router]\nlisten = ", &[], &[], &["janua.toml, line 2: "]),
    ];
    for (file, environment, flags, expected) in cases {
        let error = router(file, environment, flags).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
        assert!(!error.contains('\n'), "{error:?} is more than one line");
    }
}

#[test]
fn a_needed_key_is_named() {
    let error = resolve("", &[], &[]).unwrap().section::<Needy>("language").unwrap_err().to_string();
    assert_eq!(error, "language.threads: a value is needed (in no file, variable or flag)");
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Some(Path::new("/nonexistent/janua.toml")), &[]).unwrap_err().to_string();
    assert_eq!(error, "cannot read /nonexistent/janua.toml");
}

#[test]
fn models_from_file_variable_and_flag() {
    let file = "[[models]]\nname = 'a'\npath = 'x'\n[[models]]\nname = 'b'\npath = 'y'\n";
    let names = |config: &Config| config.models().iter().map(|m| format!("{}={}", m.name, m.path.display())).collect::<Vec<_>>();
    let mut config = resolve(file, &[], &[]).unwrap();
    assert_eq!(names(&config), ["a=x", "b=y"]);
    config.add_model("b=z").unwrap();
    config.add_model("c=w").unwrap();
    config.add_model("some/tiny/").unwrap();
    assert_eq!(names(&config), ["a=x", "b=z", "c=w", "tiny=some/tiny/"]);
    assert_eq!(names(&resolve(file, &[("JANUA_MODELS", "d=1,e=2")], &[]).unwrap()), ["d=1", "e=2"]);
}

#[test]
fn vae_folders_from_file_and_flag() {
    let file = "[[models]]\nname = 'a'\npath = 'x'\nvae = 'v'\n[[models]]\nname = 'b'\npath = 'y'\n";
    let mut config = resolve(file, &[], &[]).unwrap();
    assert_eq!((config.vae("a"), config.vae("b"), config.vae("c")), (Some("v".into()), None, None));
    config.add_vae("b=some/vae").unwrap();
    assert_eq!(config.vae("b"), Some("some/vae".into()));
    assert_eq!(config.add_vae("c=w").unwrap_err().to_string(), "models.vae: there is no model c (from --vae)");
    assert_eq!(config.add_vae("w").unwrap_err().to_string(), "models.vae: 2 models: which one is meant? NAME=PATH says so (from --vae)");
    assert_eq!(config.add_vae("a=").unwrap_err().to_string(), "models.vae: the path is empty (from --vae)");
    let mut alone = resolve("", &[("JANUA_MODELS", "d=1")], &[]).unwrap();
    alone.add_vae("w").unwrap();
    assert_eq!(alone.vae("d"), Some("w".into()));
}

#[test]
fn bad_models_are_named() {
    for (file, expected) in [
        ("[[models]]\nname = 'a b'\npath = 'x'", "models.name: \"a b\""),
        ("[[models]]\nname = 'a'\npath = ''", "models.path: "),
        ("[[models]]\nname = 'a'\npath = 'x'\nvae = ''", "models.vae: "),
        ("[[models]]\nname = 'a'", "models[0]: missing field `path`"),
        ("[[models]]\nname = 'a'\npath = 'x'\nsize = 1", "models[0]: unknown field `size`"),
        ("[[models]]\nname = 'a'\npath = 'x'\n[[models]]\nname = 'a'\npath = 'y'", "models.name: a is named twice"),
        ("[models]\nname = 'a'", "models"),
    ] {
        let error = resolve(file, &[], &[]).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error:?} lacks {expected:?}");
    }
    let mut config = Config::default();
    assert_eq!(config.add_model("/").unwrap_err().to_string(), "models: \"/\" is not NAME=PATH (from --model)");
}
