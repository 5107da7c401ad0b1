"""The OpenAPI document and the page /docs."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

# Swagger's colours have too little contrast and no dark scheme, and some of its fields have no name.
_LEGIBLE = """<style>
  html { background: white }
  @media (prefers-color-scheme: dark) { html { filter: invert(.92) hue-rotate(180deg) } }
  .swagger-ui .info .title small { background: #4b5563 }
  .swagger-ui .info .title small.version-stamp { background: #3f6212 }
  .swagger-ui .opblock.opblock-get .opblock-summary-method { background: #1d5fa8 }
  .swagger-ui .opblock.opblock-post .opblock-summary-method { background: #14704a }
  .swagger-ui .btn.authorize { color: #14704a; border-color: #14704a }
  .swagger-ui .microlight { max-height: none !important; overflow: visible !important; white-space: pre-wrap }
  .swagger-ui .btn.execute { background: #1d5fa8 }
  .swagger-ui .btn.cancel, .swagger-ui .parameter__name.required::after { color: #b91c1c }
  .swagger-ui .info .base-url, .swagger-ui a.nostyle, .swagger-ui .opblock .opblock-summary-description,
  .swagger-ui .model-toggle, .swagger-ui .json-schema-2020-12__title, .swagger-ui .info a,
  .swagger-ui .json-schema-2020-12-expand-deep-button, .swagger-ui .parameter__in { color: #1f2937 }
</style>
<script>
  new MutationObserver(() => {
    for (const field of document.querySelectorAll(":is(textarea, select):not([aria-label])"))
      field.ariaLabel = field.localName === "textarea" ? "Request body" : "Media type";
  }).observe(document, { childList: true, subtree: true });
</script>
"""


def correct_document(api: FastAPI) -> None:
    """Corrects the generated OpenAPI document.

    Invalid requests get 400, not 422, a key is a bearer token, and every body has an example, which /docs sends.
    """
    document = api.openapi()
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if reference := content.get("schema", {}).get("$ref"):
                content["example"] = schemas[reference.rpartition("/")[2]]["examples"][0]
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}, {}]


def add_docs_page(api: FastAPI) -> None:
    """Serves /docs from the fastapi_offline package, so that browsers load nothing from other hosts."""
    api.mount("/docs/static", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="static")

    @api.get("/docs", include_in_schema=False)
    async def documents() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="../openapi.json",
            title=api.title,
            swagger_js_url="docs/static/swagger-ui-bundle.js",
            swagger_css_url="docs/static/swagger-ui.css",
            swagger_favicon_url="docs/static/favicon.png",
            # With deep links, each button has a link inside, which screen readers cannot reach.
            swagger_ui_parameters={"deepLinking": False, "defaultModelsExpandDepth": 0},
        )
        html = bytes(page.body).decode().replace("<html>", '<html lang="en">').replace("</head>", f"{_LEGIBLE}</head>")
        # The page sends real requests.
        return HTMLResponse(html, headers={"content-security-policy": "frame-ancestors 'none'"})
