//! Companies' certificates and proxies, tokens, and who is told what.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::fake::*;

fn tls_hub() -> Hub {
    let read = |name: &str| std::fs::read(Path::new("tests/data/hub").join(name)).unwrap();
    let chain = vec![CertificateDer::from(read("server.der"))];
    let key = PrivateKeyDer::try_from(read("server.key.der")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Hub::serve_tls(model("o/m", &usual()), Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()))
}

#[test]
fn a_companys_certificates_are_trusted_if_they_are_named() {
    let hub = tls_hub();
    let ca = std::fs::canonicalize("tests/data/hub/ca.pem").unwrap();
    for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        let home = tempfile::tempdir().unwrap();
        pulled(command(home.path(), &hub, &["models", "pull", "o/m"]).env(variable, &ca));
    }
    let home = tempfile::tempdir().unwrap();
    let (code, _, stderr) = pull(home.path(), &hub);
    assert!(code == 1 && stderr.contains("cannot be reached: ") && stderr.contains("certificate"), "{stderr}");
    assert!(stderr.contains("hint: ") && stderr.contains("SSL_CERT_FILE=CA.pem nextflow"), "{stderr}");
    for bad in ["nowhere.pem", "Cargo.toml"] {
        let (code, _, stderr) = run(command(home.path(), &hub, &["models", "pull", "o/m"]).env("SSL_CERT_FILE", bad));
        assert!(code == 1 && stderr.contains(&format!("SSL_CERT_FILE={bad} has no certificates")), "{stderr}");
    }
    // Folders as c_rehash makes them: named by a hash.
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(&ca, folder.path().join("0123abcd.0")).unwrap();
    pulled(command(home.path(), &hub, &["models", "pull", "o/m"]).env("SSL_CERT_DIR", folder.path()));
}

/// A proxy that understands CONNECT and SOCKS5, and what it was asked for.
fn proxy() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, log) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Vec::new())));
    let asked = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let asked = asked.clone();
            std::thread::spawn(move || tunnel(stream, &asked));
        }
    });
    (port, log)
}

fn tunnel(mut stream: TcpStream, asked: &Mutex<Vec<String>>) -> Option<()> {
    let mut first = [0];
    stream.read_exact(&mut first).ok()?;
    let target = if first[0] == 5 {
        let mut methods = [0; 1];
        stream.read_exact(&mut methods).ok()?;
        stream.read_exact(&mut vec![0; methods[0].into()]).ok()?;
        stream.write_all(&[5, 0]).ok()?;
        let mut head = [0; 4];
        stream.read_exact(&mut head).ok()?;
        let host = match head[3] {
            1 => {
                let mut a = [0; 4];
                stream.read_exact(&mut a).ok()?;
                format!("{}.{}.{}.{}", a[0], a[1], a[2], a[3])
            }
            _ => {
                let mut length = [0; 1];
                stream.read_exact(&mut length).ok()?;
                let mut name = vec![0; length[0].into()];
                stream.read_exact(&mut name).ok()?;
                String::from_utf8(name).ok()?
            }
        };
        let mut port = [0; 2];
        stream.read_exact(&mut port).ok()?;
        stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).ok()?;
        asked.lock().unwrap().push(format!("socks5 {host}"));
        format!("{host}:{}", u16::from_be_bytes(port))
    } else {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
        let line = lines.next()?;
        let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
        let login = headers.iter().find(|h| h.starts_with("Proxy-Authorization")).cloned().unwrap_or_default();
        asked.lock().unwrap().push(format!("C{line} {login}"));
        stream.write_all(b"HTTP/1.1 200 Yes\r\n\r\n").ok()?;
        line.split(' ').nth(1)?.to_string()
    };
    let mut there = TcpStream::connect(target).ok()?;
    let (mut back, mut from) = (there.try_clone().ok()?, stream.try_clone().ok()?);
    std::thread::spawn(move || std::io::copy(&mut from, &mut there));
    std::io::copy(&mut back, &mut stream).ok()?;
    stream.shutdown(std::net::Shutdown::Both).ok()
}

#[test]
fn proxies_are_used() {
    let hub = Hub::serve(model("o/m", &usual()));
    let (port, asked) = proxy();
    for (variable, scheme, how) in [
        ("ALL_PROXY", "socks5", "socks5 127.0.0.1"),
        ("all_proxy", "socks5h", "socks5 127.0.0.1"),
        ("http_proxy", "http", "CONNECT 127.0.0.1:"),
        ("HTTP_PROXY", "http", "CONNECT 127.0.0.1:"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let address = format!("{scheme}://127.0.0.1:{port}");
        pulled(command(home.path(), &hub, &["models", "pull", "o/m"]).env(variable, address));
        let asked = std::mem::take(&mut *asked.lock().unwrap());
        assert!(!asked.is_empty() && asked.iter().all(|a| a.starts_with(how)), "{asked:?}");
    }
    // https through CONNECT, with a login.
    let (tls, home) = (tls_hub(), tempfile::tempdir().unwrap());
    let mut command = command(home.path(), &tls, &["models", "pull", "o/m"]);
    command
        .env("HTTPS_PROXY", format!("http://me:secret@127.0.0.1:{port}"))
        .env("SSL_CERT_FILE", "tests/data/hub/ca.pem");
    pulled(&mut command);
    assert!(asked.lock().unwrap().iter().all(|a| a.contains("Basic bWU6c2VjcmV0")), "{asked:?}");
}

#[test]
fn a_proxy_is_named_where_it_fails_and_left_out_where_it_is_not_meant() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model("o/m", &usual()));
    for proxy in ["socks5://me:secret@127.0.0.1:9", "http://me:secret@127.0.0.1:9", "me:secret@127.0.0.1:9"] {
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let (code, _, stderr) = run(command.env("ALL_PROXY", proxy));
        assert!(code == 1 && stderr.contains("through the proxy ") && stderr.contains("127.0.0.1:9 (ALL_PROXY)"));
        assert!(!stderr.contains("secret") && stderr.contains("hint: "), "{stderr}");
    }
    for proxy in ["ftp://me:secret@127.0.0.1:9", "http://me:se cret@127.0.0.1", "http://"] {
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let (code, _, stderr) = run(command.env("http_proxy", proxy));
        assert!(code == 2 && stderr.contains("http_proxy ") && !stderr.contains("cret@"), "{stderr}");
    }
    let port = hub.endpoint.rsplit(':').next().unwrap();
    for direct in ["*", "127.0.0.1", "127.0.0.0/8", "a.org, 127.0.0.1", &format!("127.0.0.1:{port}")] {
        let home = tempfile::tempdir().unwrap();
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        pulled(command.env("ALL_PROXY", "socks5://127.0.0.1:9").env("no_proxy", direct));
    }
    let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
    assert_eq!(run(command.env("ALL_PROXY", "socks5://127.0.0.1:9").env("no_proxy", "10.0.0.0/8,127.0.0.1:1")).0, 1);
}

#[test]
fn the_token_stays_with_its_host_and_port() {
    let home = tempfile::tempdir().unwrap();
    let (bytes, others) = (weights(), b"image tokenizer".to_vec());
    let other_port = Hub::serve(answers([("/blob".to_string(), ok(bytes.clone()))]));
    let other_name = Hub::serve(answers([("/blob".to_string(), ok(others.clone()))]));
    let files = [("config.json", b"{}".to_vec()), ("model.safetensors", bytes), ("image_tokenizer.pt", others)];
    let hub = Hub::serve(model("o/m", &files));
    let elsewhere = other_name.endpoint.replace("127.0.0.1", "localhost");
    hub.add(answers([
        (file_path("o/m", "config.json"), to(307, "/cached/config.json")),
        ("/cached/config.json".into(), ok("{}")),
        (file_path("o/m", "model.safetensors"), to(302, &format!("{}/blob", other_port.endpoint))),
        (file_path("o/m", "image_tokenizer.pt"), to(302, &format!("{elsewhere}/blob"))),
    ]));
    pulled(&mut command(home.path(), &hub, &["models", "pull", "o/m"]));
    let told = |hub: &Hub, path: &str| -> Vec<String> {
        hub.requests(path).iter().map(|r| r.authorization().to_string()).collect()
    };
    assert_eq!(told(&hub, "/cached/config.json"), [format!("Bearer {TOKEN}")]);
    assert_eq!((told(&other_port, "/blob"), told(&other_name, "/blob")), (vec![String::new()], vec![String::new()]));
}

#[test]
fn the_token_is_found_where_the_hubs_own_tools_look() {
    let who = |set: &dyn Fn(&mut std::process::Command, &Path)| {
        let home = tempfile::tempdir().unwrap();
        let hub = Hub::serve(model("o/m", &usual()));
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        command.env_remove("HF_TOKEN");
        set(&mut command, home.path());
        pulled(&mut command);
        hub.requests("/api")[0].authorization().to_string()
    };
    let write = |path: &Path, token: &str| std::fs::write(path, token).unwrap();
    assert_eq!(who(&|_, _| ()), "");
    assert_eq!(
        who(&|c, _| {
            c.env("HF_TOKEN", format!(" {TOKEN}\r\n"));
        }),
        format!("Bearer {TOKEN}")
    );
    assert_eq!(
        who(&|c, _| {
            c.env("HUGGING_FACE_HUB_TOKEN", TOKEN);
        }),
        format!("Bearer {TOKEN}")
    );
    assert_eq!(who(&|_, home| write(&home.join("token"), "hf_file\n")), "Bearer hf_file");
    assert_eq!(
        who(&|c, home| {
            write(&home.join("token"), "hf_file\n");
            c.env("HF_TOKEN", "\n");
        }),
        "Bearer hf_file"
    );
    assert_eq!(
        who(&|c, home| {
            write(&home.join("token"), "hf_file\n");
            write(&home.join("mine"), "hf_mine\n");
            c.env("HOME", home).env("HF_TOKEN_PATH", "~/mine");
        }),
        "Bearer hf_mine"
    );
    assert_eq!(
        who(&|c, _| {
            c.env("HF_TOKEN", TOKEN).env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        }),
        ""
    );

    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model("o/m", &usual()));
    for bad in ["hf_x hf_y", "hf_\u{e9}", "hf_x\u{1b}[2J", "Bearer hf_x"] {
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let (code, _, stderr) = run(command.env("HF_TOKEN", bad));
        assert!(code == 2 && stderr.contains("HF_TOKEN does not hold a token") && !stderr.contains("hf_x"), "{stderr}");
    }
    assert!(hub.requests("").is_empty());
}

#[test]
fn passwords_of_an_endpoint_are_sent_and_never_printed() {
    let hub = Hub::serve(model("o/m", &usual()));
    let with_login = hub.endpoint.replace("http://", "http://me:pass%40word@");
    let home = tempfile::tempdir().unwrap();
    let mut pull = command(home.path(), &hub, &["models", "pull", "o/m"]);
    let stderr = pulled(pull.env("HF_ENDPOINT", &with_login));
    assert!(!stderr.contains("pass"), "{stderr}");
    assert!(hub.requests("").iter().all(|r| r.authorization() == "Basic bWU6cGFzc0B3b3Jk"));
    for (model, part) in [("o/other", "no such model"), ("o/m", "cannot be reached")] {
        let mut command = command(home.path(), &hub, &["models", "pull", model]);
        if model == "o/m" {
            command.env("HF_ENDPOINT", "http://me:password@127.0.0.1:9");
        } else {
            command.env("HF_ENDPOINT", &with_login);
        }
        let (_, _, stderr) = run(&mut command);
        assert!(stderr.contains(part) && !stderr.contains("pass") && !stderr.contains("me:"), "{stderr}");
    }
    for bad in ["mirror.corp", "me:password@mirror.corp", "ftp://me:password@mirror.corp", "http://a b", "http://"] {
        let mut command = command(home.path(), &hub, &["models", "pull", "o/m"]);
        let (code, _, stderr) = run(command.env("HF_ENDPOINT", bad));
        assert!(code == 2 && stderr.contains("HF_ENDPOINT is not") && !stderr.contains("password"), "{stderr}");
    }
}

#[test]
fn a_mirror_below_a_path_and_with_redirects_of_every_kind() {
    let bytes = weights();
    let cdn = Hub::serve(answers([("/o/m/w?sig=a%2Fb".to_string(), ok(bytes.clone()))]));
    let home = tempfile::tempdir().unwrap();
    let answers: Answers =
        model("o/m", &usual()).into_iter().map(|(path, answer)| (format!("/api/hub{path}"), answer)).collect();
    let hub = Hub::serve(answers);
    let elsewhere = cdn.endpoint.replace("http:", "").replace("127.0.0.1", "localhost");
    let mut more = Answers::new();
    more.insert(format!("/api/hub{}", file_path("o/m", "config.json")), [to(308, "../../../../c.json")].into());
    more.insert("/api/hub/c.json".into(), [ok("{}")].into());
    more.insert(
        format!("/api/hub{}", file_path("o/m", "model.safetensors")),
        [to(302, &format!("{elsewhere}/o/m/w?sig=a%2Fb"))].into(),
    );
    hub.add(more);
    let mut pull = command(home.path(), &hub, &["models", "pull", "o/m"]);
    pulled(pull.env("HF_ENDPOINT", format!("{}/api/hub/", hub.endpoint)));
}
