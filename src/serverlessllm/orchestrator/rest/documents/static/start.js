// The policy of this page forbids making code from text; zod, inside Scalar, then need not try.
globalThis.__zod_globalConfig = { jitless: true };

addEventListener("DOMContentLoaded", () => {
  // Nothing that would ask another server: fonts, telemetry, proxies, assistants.
  Scalar.createApiReference("#reference", {
    url: "/openapi.json",
    withDefaultFonts: false,
    telemetry: false,
    agent: { disabled: true },
    mcp: { disabled: true },
    hideClientButton: true,
    showDeveloperTools: "never",
    persistAuth: false,
    defaultOpenFirstTag: true,
    modelsSectionLabel: "Schemas",
    orderSchemaPropertiesBy: "preserve",
    orderRequiredPropertiesFirst: true,
    defaultHttpClient: { targetKey: "shell", clientKey: "curl" },
  });
});
