//! Which certificates are trusted: those that a variable names, or the system's and Mozilla's.

use std::path::Path;

use rustls_native_certs::{CertificateResult, load_certs_from_paths, load_native_certs};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::settings::var;
use crate::error::{Error, Kind, Result};

/// The hint for a certificate from an unknown authority.
pub(super) const HINT: &str =
    "a network that opens TLS has a certificate of its own: SSL_CERT_FILE=CA.pem nextflow ...";

/// Certificates of `SSL_CERT_FILE` and `SSL_CERT_DIR`, else of `REQUESTS_CA_BUNDLE` or
/// `CURL_CA_BUNDLE`, which the hub's own tools read; else those of the system beside Mozilla's.
///
/// Errors: [`Kind::Failure`] if a variable names a file without certificates.
pub(super) fn config() -> Result<TlsConfig> {
    let roots = match named()? {
        Some(certificates) => certificates,
        None => {
            let mozilla = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(|c| Certificate::from_der(c));
            load_native_certs().certs.iter().map(|c| Certificate::from_der(c).to_owned()).chain(mozilla).collect()
        }
    };
    Ok(TlsConfig::builder().root_certs(RootCerts::from(roots)).build())
}

fn named() -> Result<Option<Vec<Certificate<'static>>>> {
    if let (file, folder) = (var("SSL_CERT_FILE")?, var("SSL_CERT_DIR")?)
        && (file.is_some() || folder.is_some())
    {
        let variable = if file.is_some() { "SSL_CERT_FILE" } else { "SSL_CERT_DIR" };
        let path = file.clone().or(folder.clone()).unwrap_or_default();
        let found = load_certs_from_paths(file.as_deref().map(Path::new), folder.as_deref().map(Path::new));
        return some(found, variable, &path).map(Some);
    }
    for variable in ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        if let Some(text) = var(variable)? {
            let path = Path::new(&text);
            let (file, folder) = if path.is_dir() { (None, Some(path)) } else { (Some(path), None) };
            return some(load_certs_from_paths(file, folder), variable, &text).map(Some);
        }
    }
    Ok(None)
}

fn some(found: CertificateResult, variable: &str, path: &str) -> Result<Vec<Certificate<'static>>> {
    if !found.certs.is_empty() {
        return Ok(found.certs.iter().map(|c| Certificate::from_der(c).to_owned()).collect());
    }
    let why = found.errors.first().map_or_else(|| "there is none in it".into(), ToString::to_string);
    Err(Error::new(Kind::Failure, format!("{variable}={path} has no certificates: {why}"))
        .hint(format!("{variable}=CA.pem with a file of PEM certificates, or unset {variable}")))
}
